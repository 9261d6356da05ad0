"""In a process that owns an NPU: what it asks of Ascend's driver, and how it starts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from weight_broker.drivers import acl
from weight_broker.drivers.acl import (
    EXPORT_TO_ANY_PROCESS,
    IMPORT_DEFAULT,
    IMPORT_WITH_PEER_ACCESS,
    Acl,
    device_id,
)
from weight_brokerd.cards import messages
from weight_brokerd.cards.child.engine import DatasystemClient
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
        self._peers: dict[str, int] = {}
        """Devices of the other cards whose memory this process may reach, by identity."""

    def map(self, region: ImportRegion, undo: ExitStack) -> int:
        """Imports an allocation by its key, or maps chunks. A region that names no card is on the process's own."""
        if region.ipc_handle:
            raise NotPossible("this process owns an NPU, and the region is a GPU's memory")
        owner = self._reach(region.device_id) if region.device_id else self._device
        if not region.export_key:
            self._check_container(region, owner)
            return self._map_chunks(region, undo)
        key = bytes.fromhex(region.export_key)
        address = self._acl.ipc_import(key, IMPORT_DEFAULT if owner == self._device else IMPORT_WITH_PEER_ACCESS)
        undo.callback(self._acl.ipc_close, key)
        return address

    def copy(self, pairs: Sequence[tuple[Span, Span]]) -> None:
        """Between addresses of the card, also where they are another card's memory. Without a stream, the driver copies
        no imported chunk."""
        stream = self._acl.create_stream()
        with ExitStack() as undo:
            undo.callback(self._acl.destroy_stream, stream)
            undo.callback(self._acl.synchronize_stream, stream)
            for (destination, size), (source, _) in pairs:
                self._acl.copy_in_stream(destination, source, size, stream)

    def malloc(self, size: int) -> int:
        """Fresh bytes on the card."""
        return self._acl.malloc(size)

    def free(self, address: int) -> None:
        """Of `malloc`."""
        self._acl.free(address)

    def export(self, address: int, size: int) -> bytes:
        """A key that every process can import: the importing process is not known before."""
        return self._acl.ipc_export_key(address, size, EXPORT_TO_ANY_PROCESS)

    def end_export(self, key: bytes) -> None:
        """Of `export`."""
        self._acl.ipc_close(key)

    def _reach(self, peer: str) -> int:
        """The device of a card, once its memory may be mapped. Chunks of another card need peer access, keys the flag
        of their import as well. The runtime refuses a device peer access to itself."""
        if peer in self._peers:
            return self._peers[peer]
        found = [index for index in range(self._acl.device_count()) if device_id(self._acl, index) == peer]
        if not found:
            raise NotPossible(f"this process sees no card {peer}")
        if found[0] != self._device:
            self._acl.enable_peer_access(found[0])
        self._peers[peer] = found[0]
        return found[0]

    def _map_chunks(self, region: ImportRegion, undo: ExitStack) -> int:
        handles, chunk = region.shareable_handles, region.chunk_bytes
        if not handles or chunk <= 0 or region.size_bytes > len(handles) * chunk:
            raise NotPossible(f"{len(handles)} chunks of {chunk} bytes are not {region.size_bytes} bytes")
        address = self._acl.reserve_address(len(handles) * chunk)
        undo.callback(self._acl.release_address, address)
        for index, shareable in enumerate(handles):
            handle = self._hold_chunk(shareable)
            undo.callback(self._release_chunk, shareable)
            self._acl.map(address + index * chunk, chunk, handle)
            undo.callback(self._acl.unmap, address + index * chunk)
        return address

    def _check_container(self, region: ImportRegion, owner: int) -> None:
        """`owner`: the device of the memory."""
        here = self._acl.logical_device(owner)
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
        """Starts the engine in this thread: its first use of a device must not happen in several threads at once."""
        seconds = {}
        at = time.monotonic()
        runtime = acl.load()
        runtime.initialize()
        runtime.set_device(self._device)
        identity, soc = device_id(runtime, self._device), runtime.soc_name()
        seconds["set_device"] = time.monotonic() - at
        at = time.monotonic()
        client = DatasystemClient(
            start.worker_host,
            start.worker_port,
            self._device,
            connect_timeout_ms=start.connect_timeout_ms,
            credentials=start.credentials,
        )
        seconds["connect"] = time.monotonic() - at
        at = time.monotonic()
        client.warm_up(runtime)
        seconds["warm_up"] = time.monotonic() - at
        ready = messages.Ready(runtime.bare_tgid(), identity, soc, seconds)
        driver = NpuDriver(runtime, self._device)
        return Work(self._role, CardMemory(driver, driver), client, self.use), ready


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
