"""Processes that use the devices of a proof: rows would meet them, and they would meet the rows."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path


def occupants(device_files: str, *, processes: Path = Path("/proc")) -> list[int]:
    """Pids of the processes that have a file open whose whole path matches, as far as this user may look."""
    pattern = re.compile(device_files)
    numbers = (int(entry.name) for entry in processes.iterdir() if entry.name.isdecimal())
    return sorted(pid for pid in numbers if any(map(pattern.fullmatch, _open_files(processes / str(pid) / "fd"))))


def _open_files(directory: Path) -> Iterator[str]:
    try:
        names = os.listdir(directory)
    except OSError:  # of another user, or ended
        return
    for name in names:
        try:
            yield os.readlink(directory / name)
        except OSError:
            continue
