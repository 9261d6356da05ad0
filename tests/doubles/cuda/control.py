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
    MAPPED_MEMORY = "mapped-memory"
    """What is allocated now is like an expandable segment: it has no handle."""


class CudaHost:
    """A directory is a host."""

    def __init__(self) -> None:
        shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self._directory = Path(tempfile.mkdtemp(prefix="weight-broker-cuda-double-", dir=shared))

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
    """The name of a GPU on the wire."""
    return f"GPU-{UUID(bytes=bytes((0x10 * (gpu + 1) + index) & 0xFF for index in range(16)))}"
