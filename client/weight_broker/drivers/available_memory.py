"""How much host memory this process may still use.

Memory that runs out while pages are being filled ends in the kernel's out-of-memory killer, not in an error, so callers
ask first.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_UNLIMITED = 1 << 60


def available_bytes(root: Path = Path("/")) -> int | None:
    """The host's available memory, or that of this process's tightest control group if less; None if unknown."""
    found = [_host_bytes(root), *_group_bytes(root)]
    return min((value for value in found if value is not None), default=None)


def _host_bytes(root: Path) -> int | None:
    value = _fields(root / "proc/meminfo").get("MemAvailable:")
    return value * 1024 if value is not None else None


def _group_bytes(root: Path) -> Iterator[int | None]:
    """Of every control group from the process's own up to the root, in either version's hierarchy."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, usage = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit, usage = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # In a container the path may be the host's; the groups that can be seen are then found at the root.
        own = base / path.lstrip("/")
        for group in (own, *own.parents):
            yield _left_in_group(group, limit, usage)
            if group == base:
                break


def _left_in_group(group: Path, limit: str, usage: str) -> int | None:
    most, used = _read(group / limit).strip(), _read(group / usage).strip()
    if not most.isdigit() or not used.isdigit() or int(most) >= _UNLIMITED:
        return None
    return max(0, int(most) - int(used) + _reclaimable_bytes(_fields(group / "memory.stat")))


def _reclaimable_bytes(fields: dict[str, int]) -> int:
    """What the kernel drops before it refuses memory: file pages that are on disk already, used lately or not, and what
    it keeps for itself and can do without. Version 1 has the sums with the groups below as `total_`."""

    def field(name: str) -> int:
        return fields.get(f"total_{name}", fields.get(name, 0))

    on_disk = field("active_file") + field("inactive_file")
    unwritten = field("dirty") + field("writeback") + field("file_dirty") + field("file_writeback")
    return max(0, on_disk - unwritten) + field("slab_reclaimable")


def _fields(path: Path) -> dict[str, int]:
    rows = (line.split() for line in _read(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
