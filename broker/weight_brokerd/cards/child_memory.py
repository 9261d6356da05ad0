"""In a card process: what is mapped, and where the blobs of a request lie."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from weight_broker.acl import IMPORT_WITH_PEER_ACCESS, Acl, MemcpyKind
from weight_brokerd.cards.blobs import Blob, BlobList
from weight_brokerd.cards.messages import ImportRegion

Span = tuple[int, int]
"""Address and size of device memory."""


class NotPossible(Exception):
    """The request does not fit what this process has mapped. Nothing was done."""


@dataclass(slots=True)
class _Import:
    """Memory of another process. An allocation can be imported once in a process, so its regions share one."""

    address: int
    size_bytes: int
    undo: ExitStack
    region_ids: set[str] = field(default_factory=set)


class CardMemory:
    """The imports and the buffers of this process. Every method needs a thread whose current device is the card."""

    def __init__(self, acl: Acl, device: int) -> None:
        self._acl = acl
        self._device = device
        self._lock = threading.Lock()
        self._imports: dict[tuple[str, tuple[int, ...]], _Import] = {}
        self._regions: dict[str, tuple[ImportRegion, _Import]] = {}
        self._chunks: dict[int, tuple[int, int]] = {}
        """Handle here and number of uses, by shareable handle."""
        self.staging_bytes = 0

    @property
    def region_count(self) -> int:
        """Open regions."""
        return len(self._regions)

    @property
    def import_count(self) -> int:
        """Mapped allocations."""
        return len(self._imports)

    @property
    def region_bytes(self) -> int:
        """Bytes of all mapped allocations."""
        return sum(one.size_bytes for one in list(self._imports.values()))

    def open(self, region: ImportRegion) -> None:
        """Maps the region. Again with the same memory changes nothing. Raises AclError, NotPossible."""
        with self._lock:
            known = self._regions.get(region.region_id)
            if known is not None:
                if known[0] != region:
                    raise NotPossible(f"region {region.region_id!r} is other memory here")
                return
            material = (region.export_key, region.shareable_handles)
            found = self._imports.get(material)
            if found is None:
                found = self._imports[material] = self._import(region)
            elif region.size_bytes > found.size_bytes:
                raise NotPossible(f"region {region.region_id!r} has {found.size_bytes} bytes, not {region.size_bytes}")
            found.region_ids.add(region.region_id)
            self._regions[region.region_id] = region, found

    def close(self, region_id: str) -> None:
        """Unmaps the region; nothing may use it any more. Idempotent. Raises AclError: then it may still be mapped."""
        with self._lock:
            known = self._regions.pop(region_id, None)
            if known is None:
                return
            region, found = known
            found.region_ids.discard(region_id)
            if not found.region_ids:
                del self._imports[region.export_key, region.shareable_handles]
                found.undo.close()

    def close_all(self) -> None:
        """Unmaps everything."""
        for region_id in list(self._regions):
            self.close(region_id)

    def resolve(self, blobs: BlobList) -> list[list[Span]]:
        """Where the parts of each blob lie. Raises NotPossible for what is not within an open region."""
        with self._lock:
            try:
                regions = [self._regions[region_id] for region_id in blobs.region_ids]
            except KeyError as missing:
                raise NotPossible(f"region {missing} is not mapped here") from None
        spans: list[list[Span]] = []
        for blob in blobs.blobs:
            spans.append([])
            for index, offset, size in blob.parts:
                if index >= len(regions) or offset + size > regions[index][0].size_bytes:
                    raise NotPossible(f"{size} bytes at {offset} of region {index} are not within it")
                spans[-1].append((regions[index][1].address + offset, size))
        return spans

    @contextmanager
    def staging_undone_on_error(self) -> Iterator[Staging]:
        """Buffers that are freed if the block raises."""
        staging = Staging(self, self._acl)
        try:
            yield staging
        except BaseException:
            staging.free()
            raise

    def copy(self, pairs: Sequence[tuple[Span, Span]]) -> None:
        """Copies (destination, source) spans of equal sizes within the card, and waits."""
        for (destination, size), (source, _) in pairs:
            self._acl.memcpy(destination, size, source, size, MemcpyKind.DEVICE_TO_DEVICE)
        self._acl.synchronize_device()

    def _import(self, region: ImportRegion) -> _Import:
        with ExitStack() as undo:
            if region.export_key:
                key = bytes.fromhex(region.export_key)
                address = self._acl.ipc_import(key, IMPORT_WITH_PEER_ACCESS)
                undo.callback(self._acl.ipc_close, key)
            else:
                address = self._map_chunks(region, undo)
            return _Import(address, region.size_bytes, undo.pop_all())

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


class Staging:
    """The buffers of one transfer, and what the engine is to move."""

    def __init__(self, memory: CardMemory, acl: Acl) -> None:
        self._memory = memory
        self._acl = acl
        self._buffers: list[Span] = []
        self._scattered: list[tuple[Span, Span]] = []

    def place(self, blobs: Sequence[Blob], spans: Sequence[Sequence[Span]]) -> list[Span]:
        """Where the engine moves each blob: in place, or through a fresh buffer."""
        placed = []
        for blob, parts in zip(blobs, spans, strict=True):
            if not blob.is_packed:
                placed.append(parts[0])
                continue
            address = self._acl.malloc(blob.size)
            self._buffers.append((address, blob.size))
            self._memory.staging_bytes += blob.size
            placed.append((address, blob.size))
            at = address
            for part, size in parts:
                self._scattered.append(((at, size), (part, size)))
                at += size
        return placed

    def pack(self) -> None:
        """Fills the buffers from the parts."""
        if self._scattered:
            self._memory.copy(self._scattered)

    def unpack(self) -> None:
        """Fills the parts from the buffers."""
        if self._scattered:
            self._memory.copy([(part, buffered) for buffered, part in self._scattered])

    def free(self) -> None:
        """Gives the buffers back; the engine must be done with them."""
        while self._buffers:
            address, size = self._buffers[-1]
            self._acl.free(address)
            self._memory.staging_bytes -= size
            self._buffers.pop()
