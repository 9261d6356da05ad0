"""What the tests share: a real broker process, real instance processes."""
