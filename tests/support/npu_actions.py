"""What an instance on an emulated Ascend host does with its tensors: allocates, exports, digests, lets go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from support import acl as calls
from weight_broker.drivers.acl import MemcpyKind, load
from weight_broker.layout import ITEM_SIZES, MemoryFormat
from weight_broker.memory.device.digest import TorchDigester
from weight_broker.memory.npu import kind as npu
from weight_broker.memory.npu.registry import EXPORTS


@dataclass(frozen=True)
class Place:
    """A tensor of whole elements somewhere in device memory."""

    name: str
    address: int
    shape: tuple[int, ...]
    dtype: str = "bfloat16"
    memory_format: MemoryFormat = MemoryFormat.STRIDED
    padding: int = 0
    """Bytes that the format adds."""
    device: int = 0


class SharedRegion(NamedTuple):
    """A region as it goes over the wire."""

    region_id: str
    size_bytes: int
    device_id: str
    export_key: bytes
    shareable_handles: tuple[int, ...]
    chunk_bytes: int
    container_device: int | None


class Shared(NamedTuple):
    """What the broker gets to know."""

    regions: tuple[SharedRegion, ...]
    placements: tuple[tuple[int, int], ...]
    names: tuple[str, ...]
    """Of the layout's tensors, in order."""


_exported: dict[str, npu.ExportedSegments] = {}


def tensors_of(places: Sequence[Place]) -> dict[str, npu.DeviceTensor]:
    """As `describe` takes them."""
    return {place.name: _tensor(place) for place in places}


def _tensor(place: Place) -> npu.DeviceTensor:
    stride: list[int] = []
    count = 1
    for size in reversed(place.shape):
        stride.insert(0, count)
        count *= size
    size_bytes = count * ITEM_SIZES[place.dtype] + place.padding
    return npu.DeviceTensor(
        place.address,
        place.dtype,
        place.shape,
        tuple(stride),
        size_bytes,
        place.device,
        place.memory_format,
    )


def share(
    name: str,
    places: Sequence[Place],
    segments: Sequence[npu.Segment],
    importer_pids: Sequence[int] = (),
    **options: Any,
) -> Shared:
    """Exports; the export is `name`."""
    described = npu.describe_device(tensors_of(places))
    exported = npu.export_segments(described, segments, importer_pids, **options)
    _exported[name] = exported
    regions = tuple(
        SharedRegion(
            region.region_id,
            region.size_bytes,
            region.device_id,
            region.npu_allocation.export_key,
            tuple(region.npu_segment.shareable_handles),
            region.npu_segment.chunk_bytes,
            region.container_device if region.HasField("container_device") else None,
        )
        for region in exported.regions
    )
    return Shared(regions, exported.placements, tuple(spec.name for spec in described.layout))


def admit(name: str, pid: int) -> None:
    """Lets one more process import."""
    _exported[name].admit([pid])


def unshare(name: str) -> None:
    """Ends an export. What it raises says that it has to be done again."""
    _exported[name].close()


def exports() -> int:
    """How many keys and shareable handles this process has given out and not ended."""
    return len(EXPORTS)


def digests(places: Sequence[Place]) -> tuple[int, ...]:
    """MULTILINEAR_64 of each tensor, in the layout's order."""
    return npu.digest_tensors(npu.describe_device(tensors_of(places))).values


def digests_by_torch(places: Sequence[Place]) -> tuple[int, ...]:
    """The same, summed up by torch: here on the processor, where there is no torch for the double's cards."""

    def copy(destination: int, source: int, size: int) -> None:
        load().memcpy(destination, size, source, size, MemcpyKind.DEVICE_TO_HOST)

    engine = TorchDigester("cpu", copy, lambda: None)
    return npu.digest_tensors(npu.describe_device(tensors_of(places)), digester=engine).values


def current_device() -> int | None:
    """Of this process's main thread."""
    return load().current_device()


def remap(address: int, handle: int) -> int:
    """Gives the chunk at the address back and maps a fresh one there."""
    calls.unmap(address)
    calls.free_physical(handle)
    fresh = calls.malloc_physical(calls.CHUNK, 0)
    calls.map_chunk(address, calls.CHUNK, fresh)
    return fresh
