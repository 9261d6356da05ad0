"""What moves the bytes where the broker does: `local` within an NPU and between GPUs, `datasystem` between NPUs,
`staged` where the broker does not map an NPU's memory."""
