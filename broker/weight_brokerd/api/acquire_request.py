"""Acquire, checked as a whole before anything is decided.

Raises `InvalidArgument` naming the field, the value and what was expected; `TransferFailed` for a path that this broker
does not take.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from weight_broker.errors import InvalidArgument, TransferFailed
from weight_broker.kinds import TRAITS, kind_of_wire
from weight_broker.layout import Layout
from weight_broker.v1 import resources_pb2, weight_broker_service_pb2
from weight_broker.wire import key_from_wire
from weight_brokerd.api import fields
from weight_brokerd.api.incoming.requests import Received
from weight_brokerd.attach.peer import PeerCredentials
from weight_brokerd.core.model import Acquisition, TransferPath
from weight_brokerd.dataplane.plane import Place
from weight_brokerd.kinds.kind import Kind
from weight_brokerd.kinds.place_request import PlaceRequest, StagingName, check_placements, text
from weight_brokerd.kinds.registry import KindNotServed, Kinds
from weight_brokerd.kinds.steps import Steps

Request = weight_broker_service_pb2.AcquireRequest


@dataclass(frozen=True, slots=True)
class Call:
    """The facts of a call that are not in its request."""

    acquisition_id: str
    instance_id: str
    begun_at: float
    wait_seconds: float
    """The longest wait, also if the request asks for more."""
    peer: PeerCredentials | None = None
    """The instance as the kernel knows it."""


async def receiving_kind(request: Request, kinds: Kinds) -> Kind:
    """The kind of memory that receives, once its devices are known."""
    name = kind_of_wire(request.device_kind)
    served = kinds.served
    if name is not None:
        try:
            return await kinds.ready(name)
        except KindNotServed as error:
            served = error.served
    listed = ", ".join(sorted(served))
    raise InvalidArgument("device_kind", request.device_kind, f"a kind this broker serves: {listed}")


def acquisition(received: Received[Request], call: Call, kind: Kind) -> Steps[tuple[Acquisition, Place]]:
    """The acquisition, and its destination: an empty place if the instance copies for itself."""
    request, layout = received.message, received.layout
    text("request_id", request.request_id)
    key = key_from_wire(request.key)
    path = fields.path(request.path)
    if layout is None and path is not TransferPath.ZERO_COPY:
        raise InvalidArgument("layout", "not set", "the receiver's layout, unless path is TRANSFER_PATH_ZERO_COPY")
    if_absent = fields.if_absent(request.if_absent)
    destination = yield from _destination(request, call, layout, kind)
    wait = call.wait_seconds
    if request.HasField("timeout"):
        wait = min(wait, fields.seconds("timeout", request.timeout, limit=fields.MAX_TIMEOUT_SECONDS))
    rank = None
    if request.HasField("load_group"):
        rank = fields.rank_of_group(request.load_group, request.assembly_timeout)
    begun = Acquisition(
        acquisition_id=call.acquisition_id,
        key=key,
        layout=layout,
        instance_id=call.instance_id,
        if_absent=if_absent,
        device_kind=kind.name,
        device_id=request.device_id,
        path=TransferPath.STAGED if destination.is_staged else path,
        begun_at=call.begun_at,
        deadline=call.begun_at + wait,
        rank=rank,
        other_kinds=fields.other_kinds(request.takes_host_memory, kind.name),
    )
    return begun, destination


def _destination(request: Request, call: Call, layout: Layout | None, kind: Kind) -> Steps[Place]:
    if not TRAITS[kind.name].broker_copies:
        _require_own_copy(request)
        return Place(kind.name, "")
    is_staged = request.path == resources_pb2.TRANSFER_PATH_STAGED
    if layout is None or request.path == resources_pb2.TRANSFER_PATH_ZERO_COPY:
        raise InvalidArgument("path", request.path, "TRANSFER_PATH_COPY or TRANSFER_PATH_STAGED for device memory")
    if is_staged and (request.regions or request.placements):
        raise InvalidArgument("regions", len(request.regions), "none for TRANSFER_PATH_STAGED")
    place_request = PlaceRequest(
        owner=call.instance_id,
        layout=layout,
        device_field="device_id",
        device_id=request.device_id,
        regions=request.regions,
        placements=request.placements,
        is_mapped=not is_staged,
        stage=StagingName("stage_id", request.stage_id) if is_staged or request.stage_id else None,
        refusal=TransferFailed,
        peer=call.peer,
    )
    if place_request.is_mapped:
        place_request = replace(place_request, checked=(yield from check_placements(kind.name, place_request)))
    return kind.place(place_request)


def _require_own_copy(request: Request) -> None:
    """Its owner fills host memory; there is no other path."""
    if request.device_id:
        raise InvalidArgument("device_id", request.device_id, "empty for host memory")
    if request.regions or request.placements:
        raise InvalidArgument(
            "regions", len(request.regions), "none for host memory", hint="The instance copies itself."
        )
    if request.path == resources_pb2.TRANSFER_PATH_STAGED:
        raise InvalidArgument("path", request.path, "TRANSFER_PATH_COPY or TRANSFER_PATH_ZERO_COPY for host memory")
    if request.stage_id:
        raise InvalidArgument("stage_id", request.stage_id, "empty for host memory")
