"""Ascend's driver as an object: device memory is this process's own, and everybody may map it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from weight_broker.drivers import acl as acl_module
from weight_broker.drivers.acl import AclError, MemcpyKind
from weight_broker.memory.device.tensor import DeviceTensor, Segment

PAGE_BYTES = 4096


class Acl(acl_module.Acl):
    """Keeps count of what is exported."""

    def __init__(self) -> None:
        self.keys: set[bytes] = set()
        self.is_mapped = False
        """Whether somebody has what is exported mapped: the driver does not end the export then."""
        self.refuses_exports = False

    @contextmanager
    def on_device(self, device: int) -> Iterator[None]:
        yield

    def synchronize_device(self) -> None:
        pass

    def physical_device(self, device: int) -> int:
        return device

    def ipc_export_key(self, address: int, size: int, flags: int = 0) -> bytes:
        if self.refuses_exports:
            raise AclError("aclrtIpcMemGetExportKey", 507899, "no")
        key = b"%x+%x" % (address, size)
        self.keys.add(key)
        return key

    def ipc_close(self, key: bytes) -> None:
        if self.is_mapped:
            raise AclError("aclrtIpcMemClose", 507899, "is mapped")
        self.keys.remove(key)

    def memcpy(self, destination: int, destination_size: int, source: int, size: int, kind: MemcpyKind) -> None:
        ctypes.memmove(destination, source, size)


class Memory:
    """A page that counts as a segment of a device."""

    def __init__(self, fill: int = 0) -> None:
        self._buffer = ctypes.create_string_buffer(bytes([fill]) * (3 * PAGE_BYTES), 3 * PAGE_BYTES)
        self.base = -(-ctypes.addressof(self._buffer) // PAGE_BYTES) * PAGE_BYTES

    def tensor(self, size: int = PAGE_BYTES) -> DeviceTensor:
        """Its first bytes."""
        segment = Segment(self.base, PAGE_BYTES)
        return DeviceTensor(self.base, "uint8", (size,), (1,), size, 0, owner=self, segment=segment)

    def fill(self, value: int) -> None:
        """Writes all of it."""
        ctypes.memset(self.base, value, PAGE_BYTES)

    def content(self) -> bytes:
        """All of it."""
        return ctypes.string_at(self.base, PAGE_BYTES)
