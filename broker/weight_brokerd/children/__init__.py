"""Child processes of the daemon: how they are started, spoken with, given up on and replaced.

What may hang or hold the interpreter for long does so in a child. Each has a socket to the daemon, and requests and
answers of its own; it ends when the daemon does, and the daemon never waits for it without a deadline.
"""
