"""In a process that owns an NPU: what it asks of Ascend's driver, and how it starts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from weight_broker.drivers import acl
from weight_broker.drivers.acl import EXPORT_TO_ANY_PROCESS, Acl, MemcpyKind, device_id
from weight_brokerd.cards import messages
from weight_brokerd.cards.child.engine import Engine
from weight_brokerd.cards.child.memory import CardMemory, NotPossible, Span
from weight_brokerd.cards.child.work import Work
from weight_brokerd.cards.messages import NOT_SAID, ImportRegion, Role
from weight_brokerd.cards.probe import Device


class NpuDriver:
    """See `weight_brokerd.cards.child.memory.DeviceDriver`."""

    def __init__(self, runtime: Acl, device: int) -> None:
        self._acl = runtime
        self._device = device
        self._chunks: dict[int, tuple[int, int]] = {}
        """Handle here and number of uses, by shareable handle."""

    def map(self, region: ImportRegion, undo: ExitStack) -> int:
        """Imports an allocation by its key, or maps chunks by their handles."""
        if region.ipc_handle:
            raise NotPossible("this process owns an NPU, and the region is a GPU's memory")
        if not region.export_key:
            return self._map_chunks(region, undo)
        key = bytes.fromhex(region.export_key)
        address = self._acl.ipc_import(key)
        undo.callback(self._acl.ipc_close, key)
        return address

    def copy(self, pairs: Sequence[tuple[Span, Span]]) -> None:
        """Within the card."""
        for (destination, size), (source, _) in pairs:
            self._acl.memcpy(destination, size, source, size, MemcpyKind.DEVICE_TO_DEVICE)
        self._acl.synchronize_device()

    def malloc(self, size: int) -> int:
        """Fresh bytes on the card."""
        return self._acl.malloc(size)

    def free(self, address: int) -> None:
        """Of `malloc`."""
        self._acl.free(address)

    def export(self, address: int, size: int) -> bytes:
        """A key for an instance, whose process nobody knows before it imports."""
        return self._acl.ipc_export_key(address, size, EXPORT_TO_ANY_PROCESS)

    def end_export(self, key: bytes) -> None:
        """Of `export`."""
        self._acl.ipc_close(key)

    def _map_chunks(self, region: ImportRegion, undo: ExitStack) -> int:
        handles, chunk = region.shareable_handles, region.chunk_bytes
        if not handles or chunk <= 0 or region.size_bytes > len(handles) * chunk:
            raise NotPossible(f"{len(handles)} chunks of {chunk} bytes are not {region.size_bytes} bytes")
        self._check_container(region)
        address = self._acl.reserve_address(len(handles) * chunk)
        undo.callback(self._acl.release_address, address)
        for index, shareable in enumerate(handles):
            handle = self._hold_chunk(shareable)
            undo.callback(self._release_chunk, shareable)
            self._acl.map(address + index * chunk, chunk, handle)
            undo.callback(self._acl.unmap, address + index * chunk)
        return address

    def _check_container(self, region: ImportRegion) -> None:
        here = self._acl.logical_device(self._device)
        if region.container_device not in (NOT_SAID, here):
            raise NotPossible(
                f"the container of the instance counts this card as {region.container_device}, that of the broker as "
                f"{here}, and handles of chunks are relative to the container: give both the same cards, or set "
                "PYTORCH_NPU_ALLOC_CONF=expandable_segments:False for the instance"
            )

    def _hold_chunk(self, shareable: int) -> int:
        """A chunk can be imported once in a process, but publications of one instance may overlap in chunks."""
        handle, uses = self._chunks.get(shareable, (0, 0))
        if not uses:
            handle = self._acl.import_shareable_handle(shareable, self._device)
        self._chunks[shareable] = handle, uses + 1
        return handle

    def _release_chunk(self, shareable: int) -> None:
        handle, uses = self._chunks.pop(shareable)
        if uses > 1:
            self._chunks[shareable] = handle, uses - 1
        else:
            self._acl.free_physical(handle)


class NpuCard:
    """See `weight_brokerd.cards.child.main.Card`."""

    def __init__(self, role: Role, device: int) -> None:
        self._role = role
        self._device = device

    def use(self) -> None:
        """Makes the card the calling thread's device."""
        acl.load().set_device(self._device)

    def start(self, start: messages.Start) -> tuple[Work, messages.Ready]:
        """Serially, in one thread: the engine's first use of a device must not happen in several."""
        seconds = {}
        at = time.monotonic()
        runtime = acl.load()
        runtime.initialize()
        runtime.set_device(self._device)
        identity, soc = device_id(runtime, self._device), runtime.soc_name()
        seconds["set_device"] = time.monotonic() - at
        at = time.monotonic()
        engine = Engine(
            start.worker_host,
            start.worker_port,
            self._device,
            connect_timeout_ms=start.connect_timeout_ms,
            credentials=start.credentials,
        )
        seconds["connect"] = time.monotonic() - at
        at = time.monotonic()
        engine.warm_up(runtime)
        seconds["warm_up"] = time.monotonic() - at
        ready = messages.Ready(runtime.bare_tgid(), identity, soc, seconds)
        driver = NpuDriver(runtime, self._device)
        return Work(self._role, CardMemory(driver, driver), engine, self.use), ready


def open_card(role: Role, device: int) -> NpuCard:
    """For `weight_brokerd.cards.child.main`."""
    return NpuCard(role, device)


def find_devices() -> Iterator[Device]:
    """Opens each card for a moment: a card that another process keeps shows itself only then."""
    runtime = acl.load()
    runtime.initialize()
    for index in range(runtime.device_count()):
        identity, words, soc = "", "", ""
        try:
            identity, soc = device_id(runtime, index), runtime.soc_name()
            runtime.set_device(index)
            runtime.reset_device(index)
        except acl.AclError as error:
            words = str(error)
        yield Device(index, identity or f"?{index}", soc, words)
