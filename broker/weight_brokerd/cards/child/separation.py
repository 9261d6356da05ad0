"""In a process that owns a GPU: why the driver does not open memory of a process that is set apart from this one."""

from __future__ import annotations

import os
from pathlib import Path

from weight_brokerd.cards.messages import ImportRegion

INVALID_CONTEXT = 201
"""CUDA_ERROR_INVALID_CONTEXT: what libcuda says of a handle from another pid namespace."""


def why_not_opened(region: ImportRegion, code: int, *, processes: Path = Path("/proc")) -> str:
    """What sets the exporter apart, and what to do; empty if nothing does. `code`: the driver's."""
    if code == INVALID_CONTEXT and _is_in_other_namespace(region.exporter_pid, processes):
        return (
            f"The instance {_process(region.exporter_pid)} and the broker are in different pid namespaces; NVIDIA's "
            "driver opens memory within one pid namespace only. Start the containers of both with the host's "
            "(--pid=host, hostPID: true) and with --ipc=host"
        )
    if region.exporter_uid not in (-1, os.geteuid()):
        return (
            f"The instance runs as uid {region.exporter_uid} and the broker as uid {os.geteuid()}; NVIDIA's driver may "
            "share memory between processes of one user only. Run both as the same user"
        )
    return ""


def _process(pid: int) -> str:
    return f"(process {pid})" if pid else "(a process that the broker cannot see)"


def _is_in_other_namespace(pid: int, processes: Path) -> bool:
    """Of a process whose namespace may not be read, by the numbers that it has: one for each nested namespace."""
    if not pid:
        return True
    theirs, ours = _namespace(processes / str(pid)), _namespace(processes / "self")
    if theirs and ours:
        return theirs != ours
    depths = _depth(processes / str(pid)), _depth(processes / "self")
    return all(depths) and depths[0] != depths[1]


def _namespace(process: Path) -> str:
    try:
        return os.readlink(process / "ns" / "pid")
    except OSError:
        return ""


def _depth(process: Path) -> int:
    try:
        lines = (process / "status").read_text().splitlines()
    except OSError:
        return 0
    return next((len(line.split()) for line in lines if line.startswith("NSpid:")), 0)
