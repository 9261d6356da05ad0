"""Exporting the segments that tensors lie in, to the broker's card processes, which map them.

A segment is exported whole if it is one allocation. Of an expandable segment, the chunks are exported in which tensors
lie, because the same segment also has caches that are nobody's business and that the engine may want to give back.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Self

from weight_broker.drivers import acl as acl_module
from weight_broker.drivers.acl import Acl, AclError, AclUnavailable, device_id
from weight_broker.errors import PublishRefused, RetractTimeout
from weight_broker.memory.device.describe import DescribedDeviceTensors
from weight_broker.memory.device.tensor import Segment, SegmentKind
from weight_broker.memory.npu import driver as npu_driver
from weight_broker.memory.npu.registry import EXPORTS, Export

if TYPE_CHECKING:
    from weight_broker.v1 import weight_set_pb2 as pb

PAGE_BYTES = 4096
_KEY_LENGTH = 36
_KEY_CARD = slice(24, 26)
"""Of a key: 8 digits of the TGID, 16 of a serial number, 2 of the physical card, 2 and 8 of other things."""
_VMM_OFF = "Set PYTORCH_NPU_ALLOC_CONF=expandable_segments:False"


class ExportedSegments:
    """The memory of a set of tensors, ready for the broker. A context manager.

    `close` it before the memory is freed, moved or overwritten, and after the broker has let go of it.
    """

    def __init__(
        self,
        acl: Acl,
        device_index: int,
        regions: Sequence[pb.Region],
        placements: Sequence[tuple[int, int]],
        exports: Iterable[Export],
    ) -> None:
        self.regions = tuple(regions)
        self.placements = tuple(placements)
        """(index of the region, offset in bytes) of each tensor in the layout's order; an alias has its target's."""
        self._acl = acl
        self._device_index = device_index
        self._exports = list(exports)
        self._process = os.getpid()

    def admit(self, importer_pids: Iterable[int]) -> None:
        """Lets more processes import: the bare TGIDs of card processes that started later."""
        pids = list(importer_pids)
        with self._acl.on_device(self._device_index):
            for export in self._exports:
                EXPORTS.admit(self._acl, export, pids)

    def close(self) -> None:
        """Ends the exports that no other publication of this process needs. May be called again.

        That it succeeds proves nothing: the driver takes an allocation from every importer, and leaves them chunks.
        Only the broker's word does. `RetractTimeout`: the driver does not end an export; call again. Does nothing in a
        forked child: the exports are its parent's.
        """
        if self._process != os.getpid() or not self._exports:
            return
        with self._acl.on_device(self._device_index):
            while self._exports:
                try:
                    EXPORTS.release(self._acl, self._exports[-1])
                except AclError as error:
                    raise RetractTimeout(
                        f"the memory at {self._exports[-1].base:#x} is still shared: {error}; call again when the "
                        "broker has let go of it, and do not free it before"
                    ) from error
                self._exports.pop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def export_segments(
    described: DescribedDeviceTensors,
    segments: Sequence[Segment] | None = None,
    importer_pids: Iterable[int] = (),
    *,
    any_process: bool = False,
    acl: Acl | None = None,
    driver_version: str | None = None,
) -> ExportedSegments:
    """Wait for the device and export the memory that the tensors lie in.

    `segments`: the driver's allocations; torch_npu's are found without. `importer_pids`: bare TGIDs of the processes
    that may import, more can be admitted later; `any_process` lets everybody import who gets to know the keys.
    Raises `PublishRefused` with the reason and the fix; nothing is exported then.
    """
    try:
        acl = acl or acl_module.load()
    except AclUnavailable as error:
        raise PublishRefused(f"device memory cannot be shared: {error}") from error
    version = driver_version or npu_driver.installed_version()
    if described.synchronize is not None:
        described.synchronize()
    with acl.on_device(described.device_index):
        with _driver_errors("wait for the device", "Find out which operation failed before this."):
            acl.synchronize_device()
            card = device_id(acl, described.device_index)
        if segments is None:
            segments = described.segments() if described.segments is not None else ()
        with _driver_errors("say how large its chunks are", f"{_VMM_OFF}."):
            spans = _spans(acl, described, segments)
        for span in spans:
            _require_shareable(span.segment, version)
        exports: list[Export] = []
        try:
            regions = [_export_span(acl, span, card, described, importer_pids, any_process, exports) for span in spans]
        except BaseException:
            for export in exports:
                EXPORTS.release(acl, export)
            raise
    return ExportedSegments(acl, described.device_index, regions, _place(described, spans), exports)


@dataclass(slots=True)
class _Span:
    """A part of a segment that becomes a region."""

    segment: Segment
    begin: int
    end: int


def _spans(acl: Acl, described: DescribedDeviceTensors, segments: Sequence[Segment]) -> list[_Span]:
    """The parts of segments to be exported, by address, for all tensors that have memory. The driver is asked for the
    size of chunks that the allocator does not say."""
    known = [candidate for candidate in segments if candidate.device_index in (None, described.device_index)]
    known.sort(key=lambda segment: segment.base)
    bases = [segment.base for segment in known]
    spans: list[_Span] = []
    for tensor in sorted(described.tensors, key=lambda tensor: tensor.address):
        if not tensor.spec.storage_bytes or tensor.spec.alias_of:
            continue
        index = bisect_right(bases, tensor.address) - 1
        end = tensor.address + tensor.spec.storage_bytes
        if index < 0 or end > known[index].end:
            raise PublishRefused(
                f"tensor {tensor.spec.name!r} ({tensor.spec.storage_bytes} bytes at {tensor.address:#x}) is in none of "
                f"the {len(known)} known segments of device {described.device_index}, and only whole segments can be "
                "shared: name the segment it lies in; memory of a pluggable allocator (sleep mode) has to be staged",
                metadata={"tensor": tensor.spec.name},
            )
        if known[index].kind is SegmentKind.VMM and not known[index].chunk_bytes:
            known[index] = replace(known[index], chunk_bytes=acl.chunk_bytes(known[index].base, known[index].end))
        span = _span_of(known[index], tensor.address, end)
        if spans and spans[-1].segment is span.segment and span.begin <= spans[-1].end:
            spans[-1].end = max(spans[-1].end, span.end)
        else:
            spans.append(span)
    return spans


def _span_of(segment: Segment, begin: int, end: int) -> _Span:
    if segment.kind is SegmentKind.PLAIN:
        return _Span(segment, segment.base, segment.end)
    chunk = segment.chunk_bytes
    if chunk <= 0 or segment.size % chunk:
        raise PublishRefused(
            f"segments.chunk_bytes: the segment of {segment.size} bytes at {segment.base:#x} is not made of chunks "
            f"of {chunk} bytes. {_VMM_OFF}, or leave their size out"
        )
    first, last = (begin - segment.base) // chunk, -(-(end - segment.base) // chunk)
    return _Span(segment, segment.base + first * chunk, segment.base + last * chunk)


def _require_shareable(segment: Segment, version: str | None) -> None:
    if segment.sleeps:
        raise PublishRefused(
            f"the segment at {segment.base:#x} belongs to a memory pool that is taken away when the engine sleeps: "
            "start the engine without sleep mode, or let the staged path copy it"
        )
    if segment.base % PAGE_BYTES or segment.size % PAGE_BYTES:
        raise PublishRefused(
            f"the segment of {segment.size} bytes at {segment.base:#x} does not consist of whole pages of {PAGE_BYTES} "
            "bytes, and only those can be shared: allocate it with a size of whole pages (torch_npu does)"
        )
    if version is None:
        return
    floor = npu_driver.SHARING_FLOOR if segment.kind is SegmentKind.PLAIN else npu_driver.CHUNK_SHARING_FLOOR
    if npu_driver.is_below(version, floor):
        other = segment.kind is SegmentKind.VMM and not npu_driver.is_below(version, npu_driver.SHARING_FLOOR)
        fix = f" {_VMM_OFF}, or upgrade." if other else " Upgrade the driver."
        kind = "expandable segments" if segment.kind is SegmentKind.VMM else "device memory"
        raise PublishRefused(
            f"driver (HDK) {version} cannot share {kind} between processes; {floor} is the oldest that can.{fix}",
            metadata={"driver_version": version, "driver_floor": floor},
        )


def _export_span(
    acl: Acl,
    span: _Span,
    card: str,
    described: DescribedDeviceTensors,
    importer_pids: Iterable[int],
    any_process: bool,
    exports: list[Export],
) -> pb.Region:
    """Exports a part of a segment; what is exported is added to `exports`, also if it raises in between."""
    from weight_broker.v1 import weight_set_pb2 as pb

    device, pids = described.device_index, list(importer_pids)
    region = pb.Region(device_kind=pb.DEVICE_KIND_NPU, size_bytes=span.end - span.begin, device_id=card)
    if span.segment.kind is SegmentKind.PLAIN:
        with _driver_errors(f"share the allocation at {span.begin:#x}", "Is it a whole allocation of the driver's?"):
            size = span.segment.size
            export = EXPORTS.export_allocation(acl, device, span.begin, size, pids, any_process=any_process)
            exports.append(export)
        assert isinstance(export.key, bytes)
        _check_card(export.key, card)
        region.npu_allocation.export_key = export.key
        material = export.key
    else:
        chunk = span.segment.chunk_bytes
        handles = region.npu_segment.shareable_handles
        with _driver_errors(f"share the chunks at {span.begin:#x}", f"{_VMM_OFF}."):
            for address in range(span.begin, span.end, chunk):
                export = EXPORTS.export_chunk(acl, device, address, chunk, pids, any_process=any_process)
                exports.append(export)
                assert isinstance(export.key, int)
                handles.append(export.key)
        if len(set(handles)) < len(handles):
            raise PublishRefused(
                f"segments.chunk_bytes: {chunk} bytes are not the size of a chunk: one chunk was found at two places. "
                f"{_VMM_OFF}, or leave the size of chunks out"
            )
        region.npu_segment.chunk_bytes = chunk
        if (number := acl.logical_device(device)) is not None:
            region.container_device = number
        material = b",".join(str(handle).encode() for handle in handles)
    # The same memory has the same id in every publication of this process, and no other memory has.
    region.region_id = "npu-" + hashlib.sha256(b"%d/%s/%s" % (os.getpid(), card.encode(), material)).hexdigest()[:32]
    return region


def _check_card(key: bytes, card: str) -> None:
    """An export key has the physical number of the card, and so bears witness to the one that regions are named by."""
    if len(key) != _KEY_LENGTH or f"npu:{int(key[_KEY_CARD], 16)}" == card:
        return
    raise PublishRefused(
        f"the driver says that these tensors are on {card}, and their export key that they are on card "
        f"{int(key[_KEY_CARD], 16)}: report it, with the versions of CANN and of the driver (HDK)"
    )


def _place(described: DescribedDeviceTensors, spans: Sequence[_Span]) -> list[tuple[int, int]]:
    begins = [span.begin for span in spans]
    placements: list[tuple[int, int]] = []
    for tensor in described.tensors:
        index = max(bisect_right(begins, tensor.address) - 1, 0)
        placements.append((index, tensor.address - begins[index]) if tensor.spec.storage_bytes else (0, 0))
    return placements


@contextmanager
def _driver_errors(intention: str, fix: str) -> Iterator[None]:
    try:
        yield
    except AclError as error:
        raise PublishRefused(
            f"the driver does not {intention}: {error}. {fix}", metadata={"call": error.call, "code": str(error.code)}
        ) from error
