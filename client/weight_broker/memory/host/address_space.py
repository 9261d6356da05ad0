"""This process's memory by address: mappings, hints to the kernel and buffers over raw addresses.

The standard `mmap` module keeps a duplicate of the file descriptor for as long as the mapping lives and cannot place a
mapping at a multiple of the huge page size; both matter here, so this goes to the C library.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from types import TracebackType
from typing import Self

PAGE_BYTES = mmap.PAGESIZE
HUGE_PAGE_BYTES = 2 << 20

_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MADV_DONTFORK = 10
_MADV_HUGEPAGE = 14
_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
_MADV_COLLAPSE = 25

_library = ctypes.CDLL(None, use_errno=True)
_mmap = _library.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_munmap = _library.munmap
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_madvise = _library.madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_memcmp = _library.memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


class _AddressSpace(ctypes.c_ubyte * (1 << 56)):  # type: ignore[misc]  # ctypes array types are made at run time
    """An array that begins at some address and covers everything above it: one type serves every size. (ctypes keeps
    an array type for ever, so a type for each length that occurs would be a leak.) It owns nothing; `mapping` may hold
    what must outlive it."""

    mapping: Mapping | None = None


_ALL = memoryview(_AddressSpace.from_address(0))


def buffer_at(address: int, size_bytes: int) -> memoryview:
    """The bytes at `address`, writable, not owned: using it after the memory is gone crashes the process."""
    return _ALL[address : address + size_bytes]


def address_of(data: bytearray) -> int:
    """Address of the first of at least one byte; valid while `data` lives and keeps its size."""
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(data))


def equal_bytes(one: int, other: int, size_bytes: int) -> bool:
    """True if the bytes at two addresses are equal."""
    return bool(_memcmp(one, other, size_bytes) == 0)


def advise_huge_pages(address: int, size_bytes: int) -> None:
    """Ask for huge pages in the part of a range that whole huge pages can cover; never fails."""
    begin = -(-address // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    end = (address + size_bytes) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if end > begin:
        _madvise(begin, end - begin, _MADV_HUGEPAGE)


def populate_for_writing(address: int, size_bytes: int) -> int:
    """Enter a range's pages into the page tables, to be written; returns the number of the error that a write would
    meet as a signal, EINVAL if this kernel or this memory cannot say, or 0."""
    return _populate(address, size_bytes, _MADV_POPULATE_WRITE)


def populate_for_reading(address: int, size_bytes: int) -> int:
    """The same for a range that is read."""
    return _populate(address, size_bytes, _MADV_POPULATE_READ)


def _populate(address: int, size_bytes: int, how: int) -> int:
    begin = address // PAGE_BYTES * PAGE_BYTES
    if _madvise(begin, address + size_bytes - begin, how) == 0:
        return 0
    return ctypes.get_errno()


class Mapping:
    """A file mapped from its beginning, at a multiple of the huge page size, until `close` or the last reference."""

    def __init__(self, fd: int, size_bytes: int, *, shared: bool = False, writable: bool = False) -> None:
        """`shared`: writes reach the file, else they stay here (copy-on-write). Raises `OSError`.

        A sealed memfd is always mapped privately: before Linux 6.7 it refuses even a read-only shared mapping.
        """
        self.size_bytes = size_bytes
        self._reserved = 0
        # Address space for the mapping at any alignment, then the mapping itself inside it.
        self._reserved_bytes = size_bytes + HUGE_PAGE_BYTES
        self._reserved = _map(0, self._reserved_bytes, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        self.address = -(-self._reserved // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        try:
            flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
            _map(self.address, size_bytes, protection, flags | _MAP_FIXED, fd)
        except OSError:
            self.close()
            raise
        if shared and writable:
            # A child forked now would keep the mapping, and a memfd that is mapped writable cannot be sealed.
            _madvise(self.address, size_bytes, _MADV_DONTFORK)

    def back_with_huge_pages(self, offset: int, size_bytes: int) -> bool:
        """Put huge pages under a range of a shared mapping at once; False where the kernel does not.

        Ranges without a single page are passed over by the kernel: put at least one into each huge page before.
        """
        return bool(_madvise(self.address + offset, size_bytes, _MADV_COLLAPSE) == 0)

    def populate(self, offset: int, size_bytes: int) -> None:
        """Enter a range's pages, which exist, into the page tables in one go instead of one fault each; never fails."""
        _madvise(self.address + offset, size_bytes, _MADV_POPULATE_WRITE)

    def owning_buffer(self) -> memoryview:
        """The mapped bytes as a buffer; it and everything made from it keep the mapping alive."""
        space = _AddressSpace.from_address(self.address)
        space.mapping = self
        return memoryview(space)[: self.size_bytes]

    def close(self) -> None:
        """Unmap; may be called again."""
        reserved, self._reserved = self._reserved, 0
        if reserved:
            _munmap(reserved, self._reserved_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _map(address: int, size_bytes: int, protection: int, flags: int, fd: int) -> int:
    # No swap space or commit charge is set aside: pages that are only read never cost any.
    found: int | None = _mmap(address, size_bytes, protection, flags | _MAP_NORESERVE, fd, 0)
    if found is None or found == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, f"mmap of {size_bytes} bytes: {os.strerror(number)}")
    return found
