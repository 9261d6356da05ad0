"""One host with emulated GPUs: what its processes need, what they did wrong, what goes wrong for them."""

from __future__ import annotations

import enum
import os
import shutil
import tempfile
from pathlib import Path
from uuid import UUID

from doubles.cuda.build import build

GPUS = 4
_BUS_NUMBERS = (2, 0, 3, 1)
"""Of the GPUs in the driver's own order, fastest first: an index is never the number on the bus."""


class Fault(enum.StrEnum):
    """What goes wrong for all processes of the host while it is set."""

    OUT_OF_MEMORY = "out-of-memory"
    """No context can be made."""
    OPEN_REFUSED = "open-refused"
    """Handles cannot be opened."""
    COPY_FAILS = "copy-fails"
    COPY_HANGS = "copy-hangs"
    SLOW_COPY = "slow-copy"
    """Bytes per second."""
    NO_PEER_ACCESS = "no-peer-access"
    EXCLUSIVE_PROCESS = "exclusive-process"
    """The compute mode in which one process at a time has contexts on a GPU."""
    MAPPED_MEMORY = "mapped-memory"
    """What is allocated now is like an expandable segment: it has no handle."""


class CudaHost:
    """A directory is a host."""

    def __init__(self) -> None:
        shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self._directory = Path(tempfile.mkdtemp(prefix="weight-broker-cuda-double-", dir=shared))
        self._directory.chmod(0o777)  # processes of other users are on the host too

    def environment(self, visible: str | None = None) -> dict[str, str]:
        """All variables of a process on the host that runs on the double."""
        variables = {"CUDA_DOUBLE_STATE": str(self._directory), "LD_LIBRARY_PATH": str(build())}
        return variables if visible is None else {**variables, "CUDA_VISIBLE_DEVICES": visible}

    def inject(self, fault: Fault, value: float = 0) -> None:
        """Sets a fault."""
        (self._directory / f"fault-{fault}").write_text(str(value))

    def clear(self, fault: Fault) -> None:
        """Ends a fault."""
        (self._directory / f"fault-{fault}").unlink(missing_ok=True)

    def partition(self, gpu: int) -> None:
        """Divides a GPU into two instances (MIG), for processes that start now."""
        (self._directory / f"fault-partitioned-{_BUS_NUMBERS[gpu]}").write_text("0")

    def violations(self) -> list[str]:
        """What processes did that no process may do."""
        file = self._directory / "violations"
        return file.read_text().splitlines() if file.exists() else []

    def opened(self) -> list[str]:
        """Allocations that living processes have open, as EXPORTER-NUMBER-IMPORTER."""
        names = [path.name.removeprefix("import-") for path in self._directory.glob("import-*")]
        return [name for name in names if Path("/proc", name.rpartition("-")[2]).exists()]

    def close(self) -> None:
        """The host is gone; its processes have ended."""
        shutil.rmtree(self._directory)


def uuid(gpu: int) -> str:
    """The name on the wire of the GPU with this index in a process that sees all of them."""
    first = 0x10 * (_BUS_NUMBERS[gpu] + 1)
    return f"GPU-{_uuid(first)}"


def instance_uuid(gpu: int, instance: int) -> str:
    """The same of an instance of a partitioned GPU."""
    first = 0x10 * (_BUS_NUMBERS[gpu] + 1) + 0x80 + instance
    return f"MIG-{_uuid(first)}"


def _uuid(first: int) -> UUID:
    return UUID(bytes=bytes((first + index) & 0xFF for index in range(16)))
