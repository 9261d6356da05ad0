"""Publish, checked as a whole before anything is decided.

Raises `InvalidArgument` naming the field, the value and what was expected; `PublishRefused` for memory that this broker
does not serve.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import replace

from weight_broker.digest import ContentDigests
from weight_broker.errors import InvalidArgument
from weight_broker.kinds import EMPTY_KIND, TRAITS, kind_of_wire
from weight_broker.layout import Layout
from weight_broker.v1 import weight_broker_service_pb2, weight_set_pb2
from weight_broker.wire import digests_from_wire, key_from_wire
from weight_brokerd.api.fields import rank_of_group
from weight_brokerd.api.incoming.requests import Received
from weight_brokerd.attach.peer import PeerCredentials
from weight_brokerd.core.publications import Offer
from weight_brokerd.kinds.kind import Kind
from weight_brokerd.kinds.place_request import PlaceRequest, StagingName, check_placements, text
from weight_brokerd.kinds.published import PublishedMemory
from weight_brokerd.kinds.registry import Kinds
from weight_brokerd.kinds.steps import Steps

Request = weight_broker_service_pb2.PublishRequest


async def published_kind(request: Request, kinds: Kinds) -> Kind:
    """The kind of the published memory, once its devices are known."""
    if request.regions:
        return await kinds.ready(_kind_name("regions[0]", request.regions[0].device_kind), "regions[0]")
    if not request.HasField("staged"):
        return await kinds.ready(EMPTY_KIND)
    return await kinds.ready(_kind_name("staged", request.staged.device_kind), "staged")


def offer(
    received: Received[Request], instance_id: str, kind: Kind, peer: PeerCredentials | None = None
) -> Steps[tuple[Offer, PublishedMemory]]:
    """The offer, and the place of its memory. `peer`: the instance as the kernel knows it."""
    request, layout = received.message, received.layout
    request_id = text("request_id", request.request_id)
    key = key_from_wire(request.key)
    if layout is None:
        raise InvalidArgument("layout.tensors", "empty", "at least one tensor")
    content = _content(digests_from_wire(request.digests, len(layout)))
    place_request = replace(_place_request(request, instance_id, layout, kind.name), peer=peer)
    if place_request.is_mapped:
        place_request = replace(place_request, checked=(yield from check_placements(kind.name, place_request)))
    place = kind.place(place_request)
    digests = weight_broker_service_pb2.Granted(digests=request.digests).SerializeToString()
    offered = Offer(
        key=key,
        layout=layout,
        instance_id=instance_id,
        device_kind=place.kind,
        device_id=place.device_id,
        fencing_token=request.fencing_token,
        request_id=request_id,
        rank=rank_of_group(request.load_group) if request.HasField("load_group") else None,
        content=content,
    )
    return offered, PublishedMemory(place, digests)


def _content(sets: Iterable[ContentDigests]) -> dict[str, str]:
    """One digest of all digests of a kind, so that contents can be compared without keeping their digests."""
    return {
        f"{digests.algorithm} {digests.coverage} {digests.block_bytes}": hashlib.sha256(
            struct.pack(f"<{len(digests.values)}Q", *digests.values)
        ).hexdigest()
        for digests in sets
    }


def _kind_name(field: str, number: weight_set_pb2.DeviceKind.ValueType) -> str:
    name = kind_of_wire(number)
    if name is None:
        raise InvalidArgument(f"{field}.device_kind", number, "a known kind of memory")
    return name


def _place_request(request: Request, instance_id: str, layout: Layout, kind: str) -> PlaceRequest:
    is_mapped = bool(request.regions or request.placements) or not request.HasField("staged")
    field, device_id = "regions[0].device_id", request.regions[0].device_id if request.regions else ""
    stage = None
    if request.HasField("staged"):
        stage = StagingName("staged.stage_id", request.staged.stage_id)
        _require_same_memory(request, kind)
        field, device_id = "staged.device_id", request.staged.device_id
    return PlaceRequest(
        owner=instance_id,
        layout=layout,
        device_field=field,
        device_id=device_id,
        regions=request.regions,
        placements=request.placements,
        is_mapped=is_mapped,
        stage=stage,
    )


def _require_same_memory(request: Request, kind: str) -> None:
    """`staged` and the regions must name the same memory, offered in two ways."""
    staged = request.staged
    if staged.device_kind != TRAITS[kind].wire_number:
        raise InvalidArgument("staged.device_kind", staged.device_kind, f"{kind}, as the regions")
    if request.regions and staged.device_id != request.regions[0].device_id:
        raise InvalidArgument("staged.device_id", staged.device_id, f"{request.regions[0].device_id!r}, as the regions")
