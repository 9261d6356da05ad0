"""Who has a device open."""

from __future__ import annotations

import os
import re
from pathlib import Path


def occupants(nodes: str, proc: Path = Path("/proc")) -> dict[int, str]:
    """The processes that have one of the device nodes open, with their commands. `nodes`: an expression for paths.

    Only root sees the processes of other users.
    """
    return {
        int(process.name): _command(process)
        for process in proc.iterdir()
        if process.name.isdigit() and int(process.name) != os.getpid() and _has_open(process, re.compile(nodes))
    }


def _has_open(process: Path, nodes: re.Pattern[str]) -> bool:
    try:
        return any(nodes.fullmatch(target) for target in map(_target, (process / "fd").iterdir()))
    except OSError:  # it has ended, or belongs to another user
        return False


def _target(descriptor: Path) -> str:
    try:
        return os.readlink(descriptor)
    except OSError:
        return ""


def _command(process: Path) -> str:
    try:
        words = (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    return " ".join(word.decode(errors="replace") for word in words[:3]).strip()
