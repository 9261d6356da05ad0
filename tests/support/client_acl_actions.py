"""The client's own ACL, called in a process on an emulated Ascend host."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from weight_broker.drivers import acl
from weight_broker.drivers.acl import Acl, MemcpyKind


@cache
def load() -> Acl:
    """This process's runtime, initialised."""
    runtime = acl.load()
    runtime.initialize()
    return runtime


def call(method: str, *arguments: Any) -> Any:
    """Calls a method."""
    return getattr(load(), method)(*arguments)


def write(address: int, content: bytes) -> None:
    """To device memory."""
    source = ctypes.create_string_buffer(content, len(content))
    load().memcpy(address, len(content), ctypes.addressof(source), len(content), MemcpyKind.HOST_TO_DEVICE)


def read(address: int, size: int) -> bytes:
    """From device memory."""
    target = ctypes.create_string_buffer(size)
    load().memcpy(ctypes.addressof(target), size, address, size, MemcpyKind.DEVICE_TO_HOST)
    return target.raw


def devices_around(device: int, *, fail: bool = False) -> list[int | None]:
    """The current device before, within and after a stay on another one."""
    devices: list[int | None] = [load().current_device()]
    try:
        with load().on_device(device):
            devices.append(load().current_device())
            if fail:
                raise LookupError
    except LookupError:
        pass
    return [*devices, load().current_device()]


class OldAcl(Acl):
    """As CANN was before it could tell physical numbers."""

    def has(self, name: str) -> bool:
        """Whether it has the function."""
        return "DevIdBy" not in name and "Ipc" not in name and super().has(name)


def physical_device_by_old_cann(device: int) -> int:
    """By the environment."""
    return OldAcl().physical_device(device)


def export_by_old_cann() -> None:
    """Is too much for it."""
    OldAcl().ipc_export_key(0, 0)
