"""How large a demo this machine's memory can take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PROCESS_BYTES = 450 << 20
"""What a process with torch and transformers needs besides weights."""
SMALLER_SIZES = (512 << 20, 256 << 20, 128 << 20, 64 << 20, 16 << 20)


@dataclass(frozen=True)
class Plan:
    """Who keeps weights of its own: instance 1 twice (its own and those it shares), each instance that copies once, the
    ones that map none. The load from the warm disk is over before the others start."""

    copying: int
    mapping: int

    def needed_bytes(self, size_bytes: int) -> int:
        """Memory for a model of `size_bytes`."""
        weights = 2 + max(self.copying, 1)
        return weights * size_bytes + (1 + max(self.copying + self.mapping, 1)) * PROCESS_BYTES


def available_bytes() -> int | None:
    """Memory that processes can still have on this machine and in this control group; None if nobody says."""
    found = [value for value in (_machine_bytes(), _control_group_bytes()) if value is not None]
    return min(found) if found else None


def fitting_size(wanted_bytes: int, plan: Plan, available: int | None) -> int:
    """The largest size up to `wanted_bytes` that fits; the smallest of the smaller ones if none does."""
    if available is None:
        return wanted_bytes
    sizes = [wanted_bytes, *(size for size in SMALLER_SIZES if size < wanted_bytes)]
    return next((size for size in sizes if plan.needed_bytes(size) <= available), sizes[-1])


def _machine_bytes() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError):
        pass
    return None


def _control_group_bytes() -> int | None:
    """What version 2 of control groups leaves this process; the page cache that it counts can be given back."""
    try:
        line = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        group = Path("/sys/fs/cgroup") / line.removeprefix("0::").lstrip("/")
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((group / "memory.current").read_text())
        statistics = dict(row.split() for row in (group / "memory.stat").read_text().splitlines())
        return max(int(limit) - used + int(statistics.get("inactive_file", 0)), 0)
    except (OSError, StopIteration, ValueError):
        return None
