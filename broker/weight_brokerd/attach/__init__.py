"""The attach socket: who an instance is, whether it lives, and the file descriptors it shares."""
