"""Child processes that a daemon of this host has left behind."""

from __future__ import annotations

import re
from pathlib import Path

_DAEMON = re.compile(rb"weight[-_]brokerd")
_PARENT = re.compile(rb"^PPid:\s*(\d+)", re.MULTILINE)


def find(module: str, proc: Path = Path("/proc")) -> list[int]:
    """The pids of `python -m MODULE` processes, of all users, whose parent is no daemon any more."""
    argument = f"\0{module}\0".encode()
    pids = sorted(int(entry.name) for entry in proc.glob("[0-9]*"))
    return [pid for pid in pids if argument in _read(proc / str(pid) / "cmdline") and not _has_daemon(proc, pid)]


def _has_daemon(proc: Path, pid: int) -> bool:
    """Also if the process has just ended."""
    found = _PARENT.search(_read(proc / str(pid) / "status"))
    return found is None or _DAEMON.search(_read(proc / found[1].decode() / "cmdline")) is not None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
