"""An instance's statement of where tensors lie, and the checks that all kinds of memory share.

Every check raises `InvalidArgument` naming the field, the value and what was expected.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from weight_broker.errors import BrokerError, InvalidArgument, PublishRefused
from weight_broker.kinds import TRAITS, kind_of_wire
from weight_broker.layout import Layout, TensorSpec
from weight_broker.v1.weight_broker_service_pb2 import Granted
from weight_broker.v1.weight_set_pb2 import Region, TensorPlacement
from weight_brokerd.attach.peer import PeerCredentials
from weight_brokerd.cards.messages import ImportRegion
from weight_brokerd.cards.plan.pieces import Placement
from weight_brokerd.kinds.overlaps import Span, refuse_overlaps
from weight_brokerd.kinds.steps import PER_STEP, Steps, at_once

MAX_ID_CHARACTERS = 64

ImportRegionOf = Callable[[str, str, Region], ImportRegion]
"""(field, region id, region): checks the handle of a region and returns the request that maps it."""


@dataclass(frozen=True, slots=True)
class StagingName:
    """An instance's name for tensors that it copies itself."""

    field: str
    stage_id: str


@dataclass(frozen=True, slots=True)
class CheckedPlacements:
    """Placements that fit the layout and the regions."""

    pairs: tuple[Placement, ...]
    granted: bytes
    """For receivers that copy: a serialized Granted."""


@dataclass(frozen=True, slots=True)
class PlaceRequest:
    """The place in an acquire or publish request; unchecked."""

    owner: str
    """The instance."""
    layout: Layout
    device_field: str
    device_id: str
    regions: Sequence[Region] = ()
    placements: Sequence[TensorPlacement] = ()
    is_mapped: bool = True
    """Whether the broker may map the memory: regions and placements say where it is."""
    stage: StagingName | None = None
    """Set if the owner offers to copy the memory."""
    refusal: type[BrokerError] = PublishRefused
    """The error if this broker does not take the path."""
    peer: PeerCredentials | None = None
    """The instance as the kernel knows it."""
    checked: CheckedPlacements | None = None
    """The placements, if they were checked before."""


def text(field: str, value: str, *, limit: int = MAX_ID_CHARACTERS, required: bool = True) -> str:
    """A text of bounded length."""
    if required and not value:
        raise InvalidArgument(field, value, "a text that is not empty")
    if len(value) > limit:
        raise InvalidArgument(field, value, f"at most {limit} characters, got {len(value)}")
    return value


def listed(names: Collection[str]) -> str:
    """Names for people."""
    return ", ".join(sorted(names)) or "none"


def require_unstaged(kind: str, request: PlaceRequest) -> None:
    """Refuses staging, for a kind of memory that is never staged."""
    if request.stage is None:
        return
    if request.is_mapped:
        raise InvalidArgument(request.stage.field, request.stage.stage_id, f"empty: {kind} memory is never staged")
    raise request.refusal(f"{kind} memory is never staged; name its regions and placements instead")


def device_of(request: PlaceRequest, device_ids: Collection[str]) -> str:
    """The device of the request, if it is one of this host."""
    device_id = text(request.device_field, request.device_id)
    if device_id not in device_ids:
        raise InvalidArgument(request.device_field, device_id, f"a device of this host: {listed(device_ids)}")
    return device_id


def regions_of(kind: str, request: PlaceRequest, import_region: ImportRegionOf) -> tuple[ImportRegion, ...]:
    """All regions, on the request's device. Their ids become unique on this host: instances choose them freely."""
    if not request.regions and request.layout.content_bytes:
        need = f"the regions of {request.layout.content_bytes} bytes of content"
        raise InvalidArgument("regions", "empty", need)
    seen: set[str] = set()
    return tuple(
        _region(kind, request, f"regions[{index}]", region, seen, import_region)
        for index, region in enumerate(request.regions)
    )


def _region(
    kind: str, request: PlaceRequest, field: str, region: Region, seen: set[str], import_region: ImportRegionOf
) -> ImportRegion:
    text(f"{field}.region_id", region.region_id)
    if region.region_id in seen:
        raise InvalidArgument(f"{field}.region_id", region.region_id, "an id that no other region has")
    seen.add(region.region_id)
    _same_device(kind, request, field, region)
    if not region.size_bytes:
        raise InvalidArgument(f"{field}.size_bytes", 0, "more than 0")
    handles = TRAITS[kind].handles
    handle = region.WhichOneof("handle")
    if handle not in handles:
        raise InvalidArgument(f"{field}.handle", handle, f"{' or '.join(handles)} for {kind} memory")
    return import_region(field, f"{request.owner}/{region.region_id}", region)


def _same_device(kind: str, request: PlaceRequest, field: str, region: Region) -> None:
    named = kind_of_wire(region.device_kind)
    if named is None:
        raise InvalidArgument(f"{field}.device_kind", region.device_kind, "a known kind of memory")
    if named != kind:
        raise InvalidArgument(f"{field}.device_kind", named, f"{kind}, as the weight set has")
    if region.device_id != request.device_id:
        expected = f"{request.device_id!r}, as {request.device_field}" if request.device_id else "empty"
        raise InvalidArgument(f"{field}.device_id", region.device_id, expected)


def placements_of(kind: str, request: PlaceRequest) -> CheckedPlacements:
    """Where each tensor lies in the regions, in the layout's order."""
    return request.checked or at_once(check_placements(kind, request))


def check_placements(kind: str, request: PlaceRequest) -> Steps[CheckedPlacements]:
    """`placements_of`, in steps."""
    layout, placements, traits = request.layout, request.placements, TRAITS[kind]
    if len(placements) != len(layout):
        raise InvalidArgument("placements", len(placements), f"{len(layout)}, one for each tensor")
    # Without regions no tensor has content: all placements are 0 in an empty region.
    sizes = [region.size_bytes for region in request.regions] or [0]
    is_packed = traits.is_packed or not request.regions
    pairs: list[Placement] = []
    spans: list[Span] = []
    granted: list[bytes] = []
    for start in range(0, len(layout), PER_STEP):
        part = placements[start : start + PER_STEP]
        for spec, placement in zip(layout.tensors[start : start + PER_STEP], part, strict=True):
            field = f"placements[{spec.name}]"
            length = spec.content_bytes if is_packed else spec.storage_bytes
            pair = _within(field, placement, length, sizes)
            if spec.alias_of:
                if pair != pairs[bisect_left(layout.tensors, spec.alias_of, key=_name)]:  # it sorts before its alias
                    raise InvalidArgument(field, f"{pair[0]}:{pair[1]}", f"that of {spec.alias_of}, its target")
            elif length:
                spans.append((*pair, length))
            pairs.append(pair)
        if not traits.broker_copies:
            granted.append(Granted(placements=part).SerializeToString())
        yield
    if is_packed:
        yield from refuse_overlaps(spans)
    return CheckedPlacements(tuple(pairs), b"".join(granted))


def _name(spec: TensorSpec) -> str:
    return spec.name


def _within(field: str, placement: TensorPlacement, length: int, sizes: Sequence[int]) -> Placement:
    index, offset = placement.region_index, placement.offset_bytes
    if index >= len(sizes):
        raise InvalidArgument(f"{field}.region_index", index, f"below {len(sizes)}")
    if offset + length > sizes[index]:
        raise InvalidArgument(f"{field}.offset_bytes", offset, f"{length} bytes within the region's {sizes[index]}")
    return index, offset
