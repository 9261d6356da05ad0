"""Requests of the wire, checked as a whole before anything is decided.

Every function raises `InvalidArgument` naming the field, the value and what was expected, or returns domain values that
need no further checks.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Collection, Sequence

from google.protobuf.duration_pb2 import Duration

from weight_broker.errors import InvalidArgument, PublishRefused
from weight_broker.layout import Layout
from weight_broker.v1 import resources_pb2, weight_broker_service_pb2, weight_set_pb2
from weight_broker.wire import (
    coverage_from_wire,
    digests_from_wire,
    key_from_wire,
    layout_from_wire,
)
from weight_brokerd.api.messages import DEVICE_KIND_NAMES, PHASE_NAMES
from weight_brokerd.cards.handles import import_request
from weight_brokerd.core.model import (
    HOST_MEMORY,
    Arrival,
    FailureCause,
    IfAbsent,
    Offer,
    RankOfGroup,
    TransferPath,
)
from weight_brokerd.dataplane.protocol import Place
from weight_brokerd.kinds.published import PublishedMemory, PublishedRegion

MAX_ID_CHARACTERS = 64
MAX_EXTENSION_SECONDS = 24 * 3600.0
MAX_LOAD_GROUP_SIZE = 4096
MAX_TIMEOUT_SECONDS = 7 * 24 * 3600.0
MAX_EXPORT_KEY_BYTES = 128
CUDA_HANDLE_BYTES = 64

_IF_ABSENT = {
    weight_broker_service_pb2.IF_ABSENT_FAIL: IfAbsent.FAIL,
    weight_broker_service_pb2.IF_ABSENT_WAIT: IfAbsent.WAIT,
    weight_broker_service_pb2.IF_ABSENT_LOAD: IfAbsent.LOAD,
}
_PATHS = {
    resources_pb2.TRANSFER_PATH_COPY: TransferPath.COPY,
    resources_pb2.TRANSFER_PATH_ZERO_COPY: TransferPath.ZERO_COPY,
    resources_pb2.TRANSFER_PATH_STAGED: TransferPath.STAGED,
}
_CAUSES = {
    weight_broker_service_pb2.TransferFailed.CAUSE_SOURCE_UNREACHABLE: FailureCause.SOURCE_UNREACHABLE,
    weight_broker_service_pb2.TransferFailed.CAUSE_DIGEST_MISMATCH: FailureCause.DIGEST_MISMATCH,
    weight_broker_service_pb2.TransferFailed.CAUSE_RECEIVER: FailureCause.RECEIVER,
}
_HANDLES = {"cpu": "host_memory", "npu": "npu_", "cuda": "cuda_"}
"""How the names of the handles begin that go with a kind of memory."""
_WEIGHT_SET_ID = re.compile(r"[0-9a-f]{32}")


class LayoutCache:
    """Layouts that were validated already, by the digest of their message: instances of one model send the same
    bytes, and decoding 400 tensors takes longer than everything else the broker does for an acquisition."""

    def __init__(self, size: int = 64, tensors: int = 200_000) -> None:
        """Keeps at most `size` layouts with at most `tensors` tensors together, those used last."""
        self._size = size
        self._tensors = tensors
        self._kept_tensors = 0
        self._layouts: OrderedDict[bytes, Layout] = OrderedDict()

    def layout(self, message: weight_set_pb2.Layout) -> Layout:
        """The layout in the message."""
        digest = hashlib.sha256(message.SerializeToString(deterministic=True)).digest()
        layout = self._layouts.get(digest)
        if layout is None:
            layout = layout_from_wire(message)
            if len(layout) <= self._tensors:  # one that does not fit would only push the others out
                self._keep(digest, layout)
        else:
            self._layouts.move_to_end(digest)
        return layout

    def _keep(self, digest: bytes, layout: Layout) -> None:
        self._layouts[digest] = layout
        self._kept_tensors += len(layout)
        while len(self._layouts) > self._size or self._kept_tensors > self._tensors:
            _, oldest = self._layouts.popitem(last=False)
            self._kept_tensors -= len(oldest)


def text(field: str, value: str, *, limit: int = MAX_ID_CHARACTERS, required: bool = True) -> str:
    """A text of bounded length."""
    if required and not value:
        raise InvalidArgument(field, value, "a text that is not empty")
    if len(value) > limit:
        raise InvalidArgument(field, value, f"at most {limit} characters, got {len(value)}")
    return value


def weight_set_id(field: str, value: str) -> str:
    """The id of a weight set."""
    if not _WEIGHT_SET_ID.fullmatch(value):
        raise InvalidArgument(field, value, "32 lower-case hex digits, as WeightSetKey.id gives them")
    return value


def seconds(field: str, value: Duration, *, limit: float) -> float:
    """A duration that is positive and at most `limit` seconds."""
    total = _duration(field, value)
    if not 0 < total <= limit:
        raise InvalidArgument(field, f"{total} s", f"more than 0 and at most {limit} s")
    return total


def if_absent(value: weight_broker_service_pb2.IfAbsent.ValueType) -> IfAbsent:
    """What to do if nobody holds the weight set."""
    found = _IF_ABSENT.get(value)
    if found is None:
        raise InvalidArgument("if_absent", value, "IF_ABSENT_FAIL, IF_ABSENT_WAIT or IF_ABSENT_LOAD")
    return found


def path(value: resources_pb2.TransferPath.ValueType) -> TransferPath:
    """How the bytes are to reach the receiver."""
    found = _PATHS.get(value)
    if found is None:
        raise InvalidArgument("path", value, "TRANSFER_PATH_COPY, TRANSFER_PATH_ZERO_COPY or TRANSFER_PATH_STAGED")
    return found


def cause(value: weight_broker_service_pb2.TransferFailed.Cause.ValueType) -> FailureCause:
    """Why a transfer failed."""
    found = _CAUSES.get(value)
    if found is None:
        raise InvalidArgument("failed.cause", value, "a cause other than CAUSE_UNSPECIFIED")
    return found


def arrival(message: weight_broker_service_pb2.TransferSucceeded) -> Arrival:
    """What a receiver reports of a transfer that succeeded."""
    verified = coverage_from_wire(message.verified)
    if verified is None:
        raise InvalidArgument("succeeded.verified", message.verified, "DIGEST_COVERAGE_FULL or _SAMPLED")
    phases: list[tuple[str, float]] = []
    for index, phase in enumerate(message.phase_times):
        field = f"succeeded.phase_times[{index}]"
        name = PHASE_NAMES.get(phase.phase)
        if name is None:
            raise InvalidArgument(f"{field}.phase", phase.phase, "a phase other than PHASE_UNSPECIFIED")
        duration = _duration(f"{field}.duration", phase.duration)
        if not 0 <= duration <= MAX_EXTENSION_SECONDS:
            raise InvalidArgument(f"{field}.duration", f"{duration} s", f"0 to {MAX_EXTENSION_SECONDS} s")
        phases.append((name, duration))
    return Arrival(message.size_bytes, tuple(phases), verified)


def receiving_device(kind: weight_set_pb2.DeviceKind.ValueType, device_id: str, served: Collection[str]) -> str:
    """The kind of memory that receives."""
    name = DEVICE_KIND_NAMES.get(kind)
    if name is None or name not in served:
        raise InvalidArgument("device_kind", kind, f"a kind this broker serves: {_listed(served)}")
    if name == HOST_MEMORY and device_id:
        raise InvalidArgument("device_id", device_id, "empty for host memory")
    return name


def destination(
    request: weight_broker_service_pb2.AcquireRequest, instance_id: str, layout: Layout, cards: Collection[str]
) -> Place:
    """Where the broker is to move the bytes to."""
    if request.path != resources_pb2.TRANSFER_PATH_COPY:
        raise InvalidArgument("path", request.path, "TRANSFER_PATH_COPY for device memory")
    text("device_id", request.device_id)
    regions = request.regions
    if not regions and layout.content_bytes:
        raise InvalidArgument("regions", "empty", f"the regions that receive {layout.content_bytes} bytes of content")
    kind, device_id = _regions(regions, {DEVICE_KIND_NAMES[request.device_kind]})
    if regions and (DEVICE_KIND_NAMES[request.device_kind], request.device_id) != (kind, device_id):
        raise InvalidArgument("device_id", request.device_id, f"{device_id!r}, where the regions are")
    _placements(request.placements, regions, layout)
    return _place(regions, request.placements, instance_id, request.device_id, cards, "device_id")


def no_regions(request: weight_broker_service_pb2.AcquireRequest) -> None:
    """Host memory is filled by its owner."""
    if request.regions or request.placements:
        raise InvalidArgument(
            "regions", len(request.regions), "none for host memory", hint="The instance copies itself."
        )


def rank_of_group(message: weight_set_pb2.LoadGroup, assembly_timeout: Duration | None = None) -> RankOfGroup:
    """Which rank of which engine the caller is."""
    name = text("load_group.group_id", message.group_id)
    if not 2 <= message.size <= MAX_LOAD_GROUP_SIZE:
        raise InvalidArgument("load_group.size", message.size, f"2 to {MAX_LOAD_GROUP_SIZE}")
    if message.member >= message.size:
        raise InvalidArgument("load_group.member", message.member, f"below the size, {message.size}")
    patience = 0.0
    if assembly_timeout is not None:
        patience = seconds("assembly_timeout", assembly_timeout, limit=MAX_EXTENSION_SECONDS)
    return RankOfGroup(name, message.member, message.size, patience)


def offer(
    request: weight_broker_service_pb2.PublishRequest,
    instance_id: str,
    layouts: LayoutCache,
    served: Collection[str],
    cards: Collection[str],
) -> tuple[Offer, PublishedMemory]:
    """What an instance offers, and where it lies. `cards` are the identities of the devices that are served."""
    request_id = text("request_id", request.request_id)
    key = key_from_wire(request.key)
    layout = layouts.layout(request.layout)
    digests_from_wire(request.digests, len(layout))
    if not request.regions and layout.content_bytes:
        raise InvalidArgument("regions", "empty", f"the regions that hold {layout.content_bytes} bytes of content")
    kind, device_id = _regions(request.regions, served)
    _placements(request.placements, request.regions, layout)
    grant = weight_broker_service_pb2.Granted(digests=request.digests)
    place = None
    if kind == HOST_MEMORY:
        grant.regions.extend(request.regions)
        grant.placements.extend(request.placements)
    else:
        place = _place(request.regions, request.placements, instance_id, device_id, cards, "regions[0].device_id")
    memory = PublishedMemory(
        tuple(PublishedRegion(region.region_id, region.size_bytes) for region in request.regions),
        grant.SerializeToString(),
        place,
    )
    return (
        Offer(
            key=key,
            layout=layout,
            instance_id=instance_id,
            device_kind=kind,
            device_id=device_id,
            fencing_token=request.fencing_token,
            request_id=request_id,
            rank=rank_of_group(request.load_group) if request.HasField("load_group") else None,
        ),
        memory,
    )


def published_kind(request: weight_broker_service_pb2.PublishRequest) -> weight_set_pb2.DeviceKind.ValueType:
    """The kind of memory that the request is about; all its regions have to be of this kind."""
    if request.HasField("staged"):
        return request.staged.device_kind
    return request.regions[0].device_kind if request.regions else weight_set_pb2.DEVICE_KIND_CPU


def _regions(regions: Sequence[weight_set_pb2.Region], served: Collection[str]) -> tuple[str, str]:
    """Kind and physical identity of the device that all of them are on; host memory if there are none."""
    seen: set[str] = set()
    first: tuple[str, str] | None = None
    for index, region in enumerate(regions):
        field = f"regions[{index}]"
        text(f"{field}.region_id", region.region_id)
        if region.region_id in seen:
            raise InvalidArgument(f"{field}.region_id", region.region_id, "an id that no other region has")
        seen.add(region.region_id)
        kind = DEVICE_KIND_NAMES.get(region.device_kind)
        if kind is None:
            raise InvalidArgument(f"{field}.device_kind", region.device_kind, "a known kind of memory")
        if kind not in served:
            raise PublishRefused(
                f"{field} is in {kind} memory; this broker serves: {_listed(served)}",
                metadata={"field": f"{field}.device_kind", "value": kind},
            )
        if not region.size_bytes:
            raise InvalidArgument(f"{field}.size_bytes", 0, "more than 0")
        _handle(field, kind, region)
        first = first or (kind, region.device_id)
        if (kind, region.device_id) != first:
            raise InvalidArgument(
                f"{field}.device_id", f"{kind} {region.device_id}".strip(), f"{' '.join(first).strip()}, as regions[0]"
            )
    return first or (HOST_MEMORY, "")


def _handle(field: str, kind: str, region: weight_set_pb2.Region) -> None:
    handle = region.WhichOneof("handle")
    if handle is None or not handle.startswith(_HANDLES[kind]):
        raise InvalidArgument(f"{field}.handle", handle, f"{_HANDLES[kind]}… for {kind} memory")
    if kind == HOST_MEMORY:
        if region.device_id:
            raise InvalidArgument(f"{field}.device_id", region.device_id, "empty for host memory")
        return
    text(f"{field}.device_id", region.device_id)
    match handle:
        case "npu_allocation":
            key = region.npu_allocation.export_key
            if not 0 < len(key) <= MAX_EXPORT_KEY_BYTES:
                raise InvalidArgument(
                    f"{field}.npu_allocation.export_key", len(key), f"1 to {MAX_EXPORT_KEY_BYTES} bytes"
                )
        case "npu_segment":
            segment = region.npu_segment
            if (
                not segment.shareable_handles
                or segment.chunk_bytes * len(segment.shareable_handles) != region.size_bytes
            ):
                raise InvalidArgument(
                    f"{field}.npu_segment",
                    f"{len(segment.shareable_handles)} chunks of {segment.chunk_bytes} bytes",
                    f"chunks that make up the region's {region.size_bytes} bytes",
                )
        case "cuda_allocation":
            size = len(region.cuda_allocation.ipc_handle)
            if size != CUDA_HANDLE_BYTES:
                raise InvalidArgument(f"{field}.cuda_allocation.ipc_handle", size, f"{CUDA_HANDLE_BYTES} bytes")


def _place(
    regions: Sequence[weight_set_pb2.Region],
    placements: Sequence[weight_set_pb2.TensorPlacement],
    instance_id: str,
    device_id: str,
    cards: Collection[str],
    field: str,
) -> Place:
    if device_id not in cards:
        raise InvalidArgument(field, device_id, f"a device of this host: {_listed(cards)}")
    # Instances choose their ids by themselves; those of the host's cards have to be unique among all instances.
    imports = [import_request(f"{instance_id}/{region.region_id}", region) for region in regions]
    return Place(device_id, tuple(imports), [(one.region_index, one.offset_bytes) for one in placements])


def _placements(
    placements: Sequence[weight_set_pb2.TensorPlacement], regions: Sequence[weight_set_pb2.Region], layout: Layout
) -> None:
    if len(placements) != len(layout):
        raise InvalidArgument("placements", len(placements), f"{len(layout)}, one for each tensor")
    # Without regions nothing has content, and everything lies at the beginning of nothing.
    sizes = [region.size_bytes for region in regions] or [0]
    by_name: dict[str, weight_set_pb2.TensorPlacement] = {}
    for spec, placement in zip(layout.tensors, placements, strict=True):
        field = f"placements[{spec.name}]"
        if placement.region_index >= len(sizes):
            raise InvalidArgument(f"{field}.region_index", placement.region_index, f"below {len(sizes)}")
        # Host memory has a tensor's elements packed; in device memory it lies as its owner has it.
        is_packed = not regions or regions[0].device_kind == weight_set_pb2.DEVICE_KIND_CPU
        length = spec.content_bytes if is_packed else spec.storage_bytes
        if placement.offset_bytes + length > sizes[placement.region_index]:
            raise InvalidArgument(
                f"{field}.offset_bytes",
                placement.offset_bytes,
                f"{length} bytes within the region's {sizes[placement.region_index]}",
            )
        if spec.alias_of and placement != by_name[spec.alias_of]:
            raise InvalidArgument(
                field, f"{placement.region_index}:{placement.offset_bytes}", f"that of {spec.alias_of}, its target"
            )
        by_name[spec.name] = placement


def _duration(field: str, value: Duration) -> float:
    """In seconds; google.protobuf.Duration has more forms for a negative one than for others, and none is wanted."""
    if not 0 <= value.nanos < 1_000_000_000 or value.seconds < 0:
        shown = f"{value.seconds} s and {value.nanos} ns"
        raise InvalidArgument(field, shown, "a duration of 0 or more, with less than a second of nanoseconds")
    return value.seconds + value.nanos * 1e-9


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names)) or "none"
