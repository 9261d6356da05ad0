"""What moves bytes for the broker: `copy` within an NPU and between GPUs, `datasystem` between NPUs, `staged` where the
broker does not map an NPU's memory."""
