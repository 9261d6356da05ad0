"""Tells whether files are in the page cache and drops them from it, without privileges, for readable files."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

_WINDOW_BYTES = 1 << 30
_COLD_BELOW = 0.01


def evict(files: Iterable[Path]) -> None:
    """Asks the kernel to drop the files' pages. Pages that are dirty or mapped by a process stay: see
    `resident_share`."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_through(file: Path) -> None:
    """Read a file into the page cache."""
    with file.open("rb", buffering=0) as stream:
        while stream.read(1 << 24):
            pass


def resident_share(files: Iterable[Path]) -> float | None:
    """Share of the files' pages that are in the page cache, 0.0 to 1.0; None if the kernel does not say."""
    resident = total = 0
    for file in files:
        counted = _resident_pages(file)
        if counted is None:
            return None
        resident, total = resident + counted[0], total + counted[1]
    return resident / total if total else 0.0


def was_cold(share: float | None) -> bool:
    """True if a process that met this `share` of its files in the page cache had to read the disk."""
    return share is not None and share < _COLD_BELOW


def sentence(share: float | None) -> str:
    """What the page cache held when instance 1 began, for a reader of the demo."""
    if share is None:
        return "This kernel does not say what is in the page cache: instance 1 may have read from it."
    if was_cold(share):
        return f"Page cache emptied: {share:.1%} of the checkpoint was in it when instance 1 began."
    return f"The page cache could not be emptied: {share:.0%} of the checkpoint was in it."


def _resident_pages(file: Path) -> tuple[int, int] | None:
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    mincore.restype = ctypes.c_int
    resident = total = 0
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        for offset in range(0, size, _WINDOW_BYTES):
            length = min(_WINDOW_BYTES, size - offset)
            pages = -(-length // mmap.PAGESIZE)
            # A private writable mapping, because ctypes only takes the address of writable memory; nothing is written.
            with mmap.mmap(
                stream.fileno(), length, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=offset
            ) as window:
                first = ctypes.c_char.from_buffer(window)
                flags = ctypes.create_string_buffer(pages)
                failed = mincore(ctypes.addressof(first), length, flags)
                del first
            if failed:
                return None
            resident += sum(flag & 1 for flag in flags.raw)
            total += pages
    return resident, total
