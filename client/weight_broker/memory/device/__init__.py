"""What all kinds of device memory have in common."""
