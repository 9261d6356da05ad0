"""The datasystem worker that runs on this host: which process it is, and the version of the wheel that it comes from.

The worker answers no question about its version. Its client says its own when it connects, and the worker writes a
line to its log if the two differ, and serves. So the process is looked for, and the wheel that its program lies in.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from weight_broker.drivers.ascend_requirements import installed_datasystem

PROC = Path("/proc")
PROGRAM = "datasystem_worker"
_DEFAULT_ADDRESS = "127.0.0.1:31501"
_ADDRESS = re.compile(r"^--?worker_address=(.*)")
_REPLACED = " (deleted)"
_LOOPBACK = re.compile(r"^(localhost|\[?::1\]?):")


@dataclass(frozen=True, slots=True)
class RunningWorker:
    """A worker's process."""

    pid: int
    version: str
    """Empty if it cannot be seen: the process is another user's or in a container, or its wheel was replaced."""


def find(address: str, proc: Path = PROC) -> RunningWorker | None:
    """The process whose worker has this address, HOST:PORT; None if there is none that can be seen from here."""
    for pid in sorted(int(entry.name) for entry in proc.glob("[0-9]*")):
        process = proc / str(pid)
        command = _command(process)
        if Path(command[0]).name == PROGRAM and _plain(address) in _addresses(command):
            return RunningWorker(pid, _version(process, command[0], proc) or "")
    return None


def _command(process: Path) -> list[str]:
    try:
        return (process / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:  # it has ended
        return [""]


def _addresses(command: list[str]) -> Iterator[str]:
    """Of its flags, which may be one word or two; or the worker's default."""
    named = [found[1] for word in command if (found := _ADDRESS.match(word))]
    named += [value for flag, value in itertools.pairwise(command) if flag.lstrip("-") == "worker_address"]
    yield from map(_plain, named or [_DEFAULT_ADDRESS])


def _plain(address: str) -> str:
    return _LOOPBACK.sub("127.0.0.1:", address.strip())


def _version(process: Path, named: str, proc: Path) -> str | None:
    """Of the wheel that the program lies in. The kernel says which program that is to the process's user and root, the
    command line to everyone; the latter is a path of this process's file system only outside containers."""
    try:
        program = os.readlink(process / "exe")
    except OSError:
        is_here = named.startswith("/") and _depth(process) == _depth(proc / "self")
        return installed_datasystem(Path(named).parent) if is_here else None
    if program.endswith(_REPLACED):
        return None
    return installed_datasystem(process / "root" / Path(program).parent.relative_to("/"))


def _depth(process: Path) -> int:
    """Of its pid namespace; containers have namespaces within the host's."""
    try:
        status = (process / "status").read_text()
    except OSError:
        return 0
    return next((len(line.split()) for line in status.splitlines() if line.startswith("NSpid:")), 0)
