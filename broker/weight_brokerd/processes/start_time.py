"""Which process a number means: the kernel gives a number to somebody else once its process has ended."""

from __future__ import annotations

from pathlib import Path

_FIRST_FIELD_AFTER_NAME = 3
_START_TIME_FIELD = 22


def start_time(pid: int) -> int:
    """When the process started, in clock ticks since boot. Raises OSError if there is none."""
    # The second field is the program's name in parentheses and may have anything in it, also parentheses and spaces.
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return int(fields[_START_TIME_FIELD - _FIRST_FIELD_AFTER_NAME])
