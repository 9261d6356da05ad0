"""Start time of a process. With it a pid is unique; the kernel reuses pids."""

from __future__ import annotations

from pathlib import Path

_FIRST_FIELD_AFTER_NAME = 3
_START_TIME_FIELD = 22


def start_time(pid: int) -> int:
    """Clock ticks from boot to the start of the process. Raises OSError if there is no such process."""
    # The second field is the program's name in parentheses; it may contain parentheses and spaces.
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return int(fields[_START_TIME_FIELD - _FIRST_FIELD_AFTER_NAME])
