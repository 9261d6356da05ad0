"""Memory for weights that are still being read from disk.

The kernel fills every page with zeros before it gives it out, which takes longer than copying the weights into it. A
thread has that done while the disk is read, so that those who wait for the weights get them sooner.
"""

from __future__ import annotations

import contextlib
import os
import threading

from weight_broker.drivers.available_memory import available_bytes
from weight_broker.memory.host.address_space import Mapping
from weight_broker.memory.host.memfd import ALLOCATION_BYTES, allocate_range, being_filled, create

_LEAST_BYTES = 64 << 20
"""Less is there at once when it is needed."""
_RESERVE = 3
"""Times the size that has to be available: the tensors themselves may have no memory yet, and no loader is to be pushed
to the edge by what only saves time."""


class PreparedMemory:
    """A memfd whose pages are being given out in the background, until it is taken or closed."""

    def __init__(self, size_bytes: int) -> None:
        """Raises `OSError`."""
        self._process = os.getpid()
        self._fd: int | None = None
        self._stop, self._ended = threading.Event(), threading.Event()
        self._fd = create(size_bytes)
        try:
            region = Mapping(self._fd, size_bytes, shared=True, writable=True)
            work = threading.Thread(target=_allocate, args=(self._fd, region, self._stop, self._ended), daemon=True)
            work.name = "weight-broker-memory"
            work.start()
        except BaseException:
            self._ended.set()
            self.close()
            raise

    def take(self) -> int | None:
        """The memfd, the caller's from now on; what is missing of its pages comes as it is used. None if there is none
        any more, or in another process than the one that prepared it."""
        self._stop.set()
        if self._fd is None or self._process != os.getpid():
            return None
        self._ended.wait()
        fd, self._fd = self._fd, None
        return fd

    def close(self) -> None:
        """Gives the memory back; may be called again."""
        fd = self.take()
        if fd is not None:
            being_filled.discard(fd)
            os.close(fd)

    def __del__(self) -> None:
        self.close()


def _allocate(fd: int, region: Mapping, stop: threading.Event, ended: threading.Event) -> None:
    try:
        with region, contextlib.suppress(OSError):  # whoever takes the memory meets the error too, and says what to do
            for start in range(0, region.size_bytes, ALLOCATION_BYTES):
                if stop.is_set():
                    return
                allocate_range(fd, region, start)
    finally:
        ended.set()


def prepare(size_bytes: int) -> PreparedMemory | None:
    """Memory for weights that are about to be loaded; None if there is not plenty of it, or if they are small."""
    available = available_bytes()
    if size_bytes < _LEAST_BYTES or available is None or available < _RESERVE * size_bytes:
        return None
    with contextlib.suppress(OSError, RuntimeError):  # a limit of this process: what publishes will say so
        return PreparedMemory(size_bytes)
    return None
