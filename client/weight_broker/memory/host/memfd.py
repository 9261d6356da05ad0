"""Anonymous memory that can be handed over: made, given all its pages, and not left to children that are forked."""

from __future__ import annotations

import errno
import os
from functools import partial

from weight_broker.memory.host import copying
from weight_broker.memory.host.address_space import HUGE_PAGE_BYTES, PAGE_BYTES, Mapping

_MFD_NOEXEC_SEAL = 0x8
ALLOCATION_BYTES = 16 << 20
"""Allocated between two looks at the clock."""


def create(size_bytes: int) -> int:
    """A new memfd that can be sealed; children that are forked lose it. Whoever closes or seals it takes it from
    `being_filled` before. Raises `OSError`."""
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
    """For a child that is forked while another thread publishes: it would keep the memory for as long as it lives."""
    while being_filled:
        os.close(being_filled.pop())


os.register_at_fork(after_in_child=_close_inherited)
