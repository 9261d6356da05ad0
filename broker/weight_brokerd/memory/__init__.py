"""What instances share with the broker, one module for each kind of memory."""
