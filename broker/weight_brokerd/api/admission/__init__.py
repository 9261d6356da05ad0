"""Which calls are let in: in turn, at each process's pace, and a bounded number of streams."""
