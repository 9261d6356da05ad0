"""What the broker knows and decides.

Pure: fed with events and a clock, it returns decisions. No gRPC, no I/O, no devices.
"""
