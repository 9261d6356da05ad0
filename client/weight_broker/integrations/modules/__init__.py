"""What a module of torch holds: its weights, and everything beside them that its results depend on."""
