"""Anonymous memory that can be handed over: created, allocated, and closed in forked children.

The kernel fills every page with zeros before a process gets it, which takes longer than copying weights into it.
`PreparedMemory` lets a thread do that while the weights are read from disk, so that waiters get them sooner.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from functools import partial

from weight_broker.connection import standard_streams
from weight_broker.drivers.available_memory import available_bytes
from weight_broker.memory.host import copying
from weight_broker.memory.host.address_space import HUGE_PAGE_BYTES, PAGE_BYTES, Mapping

_MFD_NOEXEC_SEAL = 0x8
ALLOCATION_BYTES = 16 << 20
"""Allocated between two looks at the clock."""
_LEAST_BYTES = 64 << 20
"""Smaller memory is allocated fast enough on demand."""
_RESERVE = 3
"""This many times the size must be available: the tensors may have no memory yet, and preparing only saves time."""


def create(size_bytes: int) -> int:
    """A new memfd that can be sealed; forked children close it. Remove it from `being_filled` before closing or
    sealing. Raises `OSError`."""
    standard_streams.occupy()
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create("weight-broker", flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:  # Linux before 6.3 does not know the flag
            raise
        fd = os.memfd_create("weight-broker", flags)
    try:
        os.ftruncate(fd, size_bytes)
    except BaseException:
        os.close(fd)
        raise
    being_filled.add(fd)
    return fd


def allocate(fd: int, region: Mapping, deadline: float | None) -> None:
    """Give the memfd all its memory, as huge pages where the kernel has them: the copy cannot run out of it half way
    (which would be SIGBUS), and neither the copy nor the readers spend their time on page faults."""
    starts = range(0, region.size_bytes, ALLOCATION_BYTES)
    copying.run((partial(allocate_range, fd, region, start) for start in starts), deadline=deadline)


def allocate_range(fd: int, region: Mapping, start: int) -> None:
    """`ALLOCATION_BYTES` from `start` on, or as many as there are. Raises `OSError`."""
    stop = min(region.size_bytes, start + ALLOCATION_BYTES)
    whole = stop // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    for offset in range(start, whole, HUGE_PAGE_BYTES):
        os.posix_fallocate(fd, offset, PAGE_BYTES)
    if whole > start:
        # One page in each huge page is enough for the kernel to fill in the others. If it does not, they follow below.
        region.back_with_huge_pages(start, whole - start)
    os.posix_fallocate(fd, start, stop - start)
    region.populate(start, stop - start)


being_filled: set[int] = set()


def _close_inherited() -> None:
    """For a child that is forked while another thread publishes: it would keep the memory as long as it lives."""
    while being_filled:
        os.close(being_filled.pop())


os.register_at_fork(after_in_child=_close_inherited)


class PreparedMemory:
    """A memfd whose pages are allocated in the background, until `take` or `close`."""

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
        """The memfd, which the caller then owns; missing pages are allocated on use. None after the first call, and in
        a process that did not prepare it."""
        self._stop.set()
        if self._fd is None or self._process != os.getpid():
            return None
        self._ended.wait()
        fd, self._fd = self._fd, None
        return fd

    def close(self) -> None:
        """Idempotent."""
        fd = self.take()
        if fd is not None:
            being_filled.discard(fd)
            os.close(fd)

    def __del__(self) -> None:
        self.close()


def _allocate(fd: int, region: Mapping, stop: threading.Event, ended: threading.Event) -> None:
    try:
        with region, contextlib.suppress(OSError):  # publishing meets the error too, and says what to do
            for start in range(0, region.size_bytes, ALLOCATION_BYTES):
                if stop.is_set():
                    return
                allocate_range(fd, region, start)
    finally:
        ended.set()


def prepare(size_bytes: int) -> PreparedMemory | None:
    """Memory for weights that are about to be loaded; None if memory is not plentiful, or if the weights are small."""
    available = available_bytes()
    if size_bytes < _LEAST_BYTES or available is None or available < _RESERVE * size_bytes:
        return None
    with contextlib.suppress(OSError, RuntimeError):  # a limit of this process: publishing reports it
        return PreparedMemory(size_bytes)
    return None
