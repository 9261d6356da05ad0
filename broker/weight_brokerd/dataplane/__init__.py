"""What moves the bytes where the broker does: `local` within a card, `datasystem` between cards."""
