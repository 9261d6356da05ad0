"""In a card process: what is mapped, and where the blobs of a request lie."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from weight_brokerd.cards.messages import ImportRegion
from weight_brokerd.cards.plan.blobs import Blob, BlobList

Span = tuple[int, int]
"""Address and size of device memory."""


class NotPossible(Exception):
    """The request does not fit what this process has mapped. Nothing was done."""


class DeviceDriver(Protocol):
    """What the driver of a kind of device does. Every method needs a thread that uses the card, and raises what is a
    `DriverError`."""

    def map(self, region: ImportRegion, undo: ExitStack) -> int:
        """The address here of another process's memory; `undo` gives it back. Raises NotPossible too."""

    def copy(self, pairs: Sequence[tuple[Span, Span]]) -> None:
        """Copies (destination, source) spans of equal sizes, and waits."""

    def malloc(self, size: int) -> int:
        """The address of `size` fresh bytes on the card."""

    def free(self, address: int) -> None:
        """Of `malloc`."""


class Exporter(Protocol):
    """Lets other processes import an allocation of this one."""

    def export(self, address: int, size: int) -> bytes:
        """The key of a whole allocation."""

    def end_export(self, key: bytes) -> None:
        """The driver takes the memory from every process that has imported it."""


@dataclass(slots=True)
class _Import:
    """Memory of another process. An allocation can be imported once in a process, so its regions share one."""

    address: int
    size_bytes: int
    undo: ExitStack
    region_ids: set[str] = field(default_factory=set)


class CardMemory:
    """The imports and the buffers of this process. Every method needs a thread that uses the card."""

    def __init__(self, driver: DeviceDriver, exporter: Exporter | None = None) -> None:
        """`exporter` shares this process's own memory; None if the kind cannot."""
        self._driver = driver
        self._exporter = exporter
        self._lock = threading.Lock()
        self._imports: dict[tuple[object, ...], _Import] = {}
        self._regions: dict[str, tuple[ImportRegion, _Import]] = {}
        self._staging_buffers: dict[str, tuple[int, int, bytes]] = {}
        """Address, size and export key of regions that are this process's own memory."""
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
        return sum(allocation.size_bytes for allocation in list(self._imports.values()))

    def open(self, region: ImportRegion) -> None:
        """Maps the region. Again with the same memory changes nothing. Raises DriverError, NotPossible."""
        with self._lock:
            known = self._regions.get(region.region_id)
            if known is not None:
                if known[0] != region:
                    raise NotPossible(f"region {region.region_id!r} is other memory here")
                return
            material = _material(region)
            found = self._imports.get(material)
            if found is None:
                with ExitStack() as undo:
                    address = self._driver.map(region, undo)
                    found = self._imports[material] = _Import(address, region.size_bytes, undo.pop_all())
            elif region.size_bytes > found.size_bytes:
                raise NotPossible(f"region {region.region_id!r} has {found.size_bytes} bytes, not {region.size_bytes}")
            found.region_ids.add(region.region_id)
            self._regions[region.region_id] = region, found

    def make_staging_buffer(self, region_id: str, size: int) -> bytes:
        """A region of fresh memory; the key that imports it. Raises DriverError, NotPossible."""
        with self._lock:
            if region_id in self._regions:
                raise NotPossible(f"region {region_id!r} is there already")
            if self._exporter is None:
                raise NotPossible("cards of this kind have no staging buffers")
            address = self._driver.malloc(size)
            try:
                key = self._exporter.export(address, size)
            except BaseException:
                self._driver.free(address)
                raise
            self._staging_buffers[region_id] = address, size, key
            self._regions[region_id] = ImportRegion(region_id, size, key.hex()), _Import(address, size, ExitStack())
            self.staging_bytes += size
            return key

    def close(self, region_id: str) -> None:
        """Unmaps the region; nothing may use it any more. Idempotent. Raises DriverError: it may be mapped still. A
        staging buffer is closed after its borrower: the driver does not refuse to free one that is imported."""
        with self._lock:
            if region_id in self._staging_buffers:
                self._free_staging_buffer(region_id)
                return
            known = self._regions.pop(region_id, None)
            if known is None:
                return
            region, found = known
            found.region_ids.discard(region_id)
            if not found.region_ids:
                del self._imports[_material(region)]
                found.undo.close()

    def close_all(self, but: Collection[str] = ()) -> None:
        """Unmaps everything except the regions `but`."""
        for region_id in self._regions.keys() - set(but):
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
        staging = Staging(self, self._driver)
        try:
            yield staging
        except BaseException:
            staging.free()
            raise

    def copy(self, pairs: Sequence[tuple[Span, Span]]) -> None:
        """Copies (destination, source) spans of equal sizes, and waits."""
        self._driver.copy(pairs)

    def _free_staging_buffer(self, region_id: str) -> None:
        assert self._exporter is not None
        address, size, key = self._staging_buffers[region_id]
        self._exporter.end_export(key)
        del self._staging_buffers[region_id], self._regions[region_id]
        self.staging_bytes -= size
        self._driver.free(address)


def _material(region: ImportRegion) -> tuple[object, ...]:
    """The same of all regions that are the same memory."""
    return region.export_key, region.shareable_handles, region.ipc_handle


class Staging:
    """The buffers of one transfer, and what the engine is to move."""

    def __init__(self, memory: CardMemory, driver: DeviceDriver) -> None:
        self._memory = memory
        self._driver = driver
        self._buffers: list[Span] = []
        self._scattered: list[tuple[Span, Span]] = []

    def place(self, blobs: Sequence[Blob], spans: Sequence[Sequence[Span]]) -> list[Span]:
        """Where the engine moves each blob: in place, or through a fresh buffer."""
        placed = []
        for blob, parts in zip(blobs, spans, strict=True):
            if not blob.is_packed:
                placed.append(parts[0])
                continue
            address = self._driver.malloc(blob.size)
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
        """Frees the buffers; the engine must be done with them."""
        while self._buffers:
            address, size = self._buffers[-1]
            self._driver.free(address)
            self._memory.staging_bytes -= size
            self._buffers.pop()
