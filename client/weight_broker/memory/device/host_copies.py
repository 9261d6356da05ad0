"""Copies between a device and host memory, by the calls of one vendor's driver."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from weight_broker.memory.kind import DeadlinePassed, Piece

STEP_BYTES = 64 << 20
"""Copied between two looks at the clock."""


@dataclass(frozen=True, slots=True)
class DriverCopies:
    """A `weight_broker.memory.kind.HostCopies`."""

    on_device: Callable[[], AbstractContextManager[object]]
    """For the length of a block the device is this thread's."""
    synchronize: Callable[[], object]
    """Waits for all work on the device; called on the device."""
    read: Callable[[int, int, int], object]
    """Copies (host address, device address, size) and waits."""
    write: Callable[[int, int, int], object]
    """Copies (device address, host address, size) and waits."""

    def to_host(self, pieces: Sequence[Piece], deadline: float | None) -> None:
        """Raises `DriverError`, `DeadlinePassed`."""
        with self.on_device():
            self.synchronize()
            for host, device, size in _steps(pieces, deadline):
                self.read(host, device, size)

    def to_device(self, pieces: Sequence[Piece], deadline: float | None) -> None:
        """Raises `DriverError`, `DeadlinePassed`."""
        with self.on_device():
            self.synchronize()
            for host, device, size in _steps(pieces, deadline):
                self.write(device, host, size)
            self.synchronize()


def _steps(pieces: Sequence[Piece], deadline: float | None) -> Iterator[Piece]:
    for host, device, size in pieces:
        for offset in range(0, size, STEP_BYTES):
            if deadline is not None and time.monotonic() >= deadline:
                raise DeadlinePassed
            yield host + offset, device + offset, min(STEP_BYTES, size - offset)
