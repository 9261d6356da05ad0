"""The unary calls of the service: build the message, call, turn a failure into an exception.

Only this module, `channel`, `acquisition` and `wire` import gRPC or protobuf at module level.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import grpc

from weight_broker.connection.channel import decode_error
from weight_broker.connection.deadline import REQUEST_TIMEOUT_SECONDS, seconds_until
from weight_broker.connection.label import shortened
from weight_broker.connection.session import Session
from weight_broker.digest import DigestCoverage
from weight_broker.errors import Reason
from weight_broker.key import WeightSetKey
from weight_broker.load_group import LoadGroup
from weight_broker.memory.kind import Shared
from weight_broker.v1 import resources_pb2, weight_set_pb2
from weight_broker.v1 import weight_broker_service_pb2 as pb
from weight_broker.wire import (
    MAX_REASON_CHARACTERS,
    coverage_to_wire,
    digests_to_wire,
    key_to_wire,
    layout_to_wire,
    lease_end,
    load_group_to_wire,
    placements_to_wire,
)

GIVE_UP_TIMEOUT_SECONDS = 30.0
"""Time for the broker to end its writing to this process's memory."""
PHASES = {
    "describe": resources_pb2.PHASE_DESCRIBE,
    "wait": resources_pb2.PHASE_WAIT,
    "reserve": resources_pb2.PHASE_RESERVE,
    "map": resources_pb2.PHASE_MAP,
    "transfer": resources_pb2.PHASE_TRANSFER,
    "verify": resources_pb2.PHASE_VERIFY,
}


def publish(
    session: Session,
    key: WeightSetKey,
    shared: Shared,
    regions: Sequence[weight_set_pb2.Region],
    *,
    fencing_token: int,
    request_id: str,
    timeout: float,
    group: LoadGroup | None = None,
) -> resources_pb2.Publication:
    """The regions must have been handed over before."""
    deadline = time.monotonic() + timeout
    request = pb.PublishRequest(
        key=key_to_wire(key),
        layout=layout_to_wire(shared.layout),
        digests=[digests_to_wire(digests) for digests in shared.digests],
        regions=regions,
        placements=placements_to_wire(shared.placements),
        fencing_token=fencing_token,
        request_id=request_id,
        load_group=load_group_to_wire(group) if group is not None else None,
        staged=shared.stage(session, seconds_until(deadline)),
    )
    timeout = seconds_until(deadline, timeout)
    try:
        return session.stub.Publish(request, timeout=timeout, metadata=session.metadata).publication
    except grpc.RpcError as error:
        raise decode_error(error) from error


def require_answer(session: Session, timeout: float) -> None:
    """Raises `BrokerUnavailable` unless the broker answers a question that costs it nothing."""
    from weight_broker.v1 import inspection_service_pb2
    from weight_broker.v1.inspection_service_pb2_grpc import InspectionServiceStub

    try:
        InspectionServiceStub(session.channel).GetHost(inspection_service_pb2.GetHostRequest(), timeout=timeout)
    except grpc.RpcError as error:
        decoded = decode_error(error)
        if decoded.reason is Reason.BROKER_UNAVAILABLE:
            raise decoded from error


def retract(session: Session, publication_id: str, *, timeout: float) -> None:
    """Returns when no reader is left."""
    request = pb.RetractRequest(publication_id=publication_id)
    try:
        session.stub.Retract(request, timeout=timeout, metadata=session.metadata)
    except grpc.RpcError as error:
        raise decode_error(error, on_deadline=Reason.RETRACT_TIMEOUT) from error


def report_success(
    session: Session,
    transfer_id: str,
    *,
    size_bytes: int,
    phases: Mapping[str, float],
    verified: DigestCoverage,
    timeout: float,
) -> None:
    """Every byte of the transfer arrived."""
    succeeded = pb.TransferSucceeded(size_bytes=size_bytes, verified=coverage_to_wire(verified))
    for name, seconds in phases.items():
        if name in PHASES:
            phase_time = succeeded.phase_times.add(phase=PHASES[name])
            phase_time.duration.FromNanoseconds(int(seconds * 1e9))
    _report_transfer(session, pb.ReportTransferRequest(transfer_id=transfer_id, succeeded=succeeded), timeout)


def report_failure(
    session: Session,
    transfer_id: str,
    *,
    cause: pb.TransferFailed.Cause.ValueType,
    detail: str,
    timeout: float,
) -> None:
    failed = pb.TransferFailed(cause=cause, detail=shortened(detail, MAX_REASON_CHARACTERS))
    _report_transfer(session, pb.ReportTransferRequest(transfer_id=transfer_id, failed=failed), timeout)


def give_up_lease(
    session: Session,
    weight_set_id: str,
    fencing_token: int,
    reason: str,
    *,
    unpublishable: bool = False,
    timeout: float = REQUEST_TIMEOUT_SECONDS,
) -> None:
    """The next waiter gets the lease; if the weights are `unpublishable`, all waiters load from disk."""
    _report_load(
        session,
        pb.ReportLoadRequest(
            weight_set_id=weight_set_id,
            fencing_token=fencing_token,
            give_up=pb.ReportLoadRequest.GiveUp(
                reason=shortened(reason, MAX_REASON_CHARACTERS), unpublishable=unpublishable
            ),
        ),
        timeout,
    )


def extend_lease(session: Session, weight_set_id: str, fencing_token: int, seconds: float | None) -> float:
    """Returns the new end of the lease, in seconds since the epoch."""
    request = pb.ReportLoadRequest(weight_set_id=weight_set_id, fencing_token=fencing_token)
    request.extend.SetInParent()
    if seconds is not None:
        request.extend.duration.FromNanoseconds(int(seconds * 1e9))
    return lease_end(_report_load(session, request).cold_load_lease)


def _report_load(
    session: Session, request: pb.ReportLoadRequest, timeout: float = REQUEST_TIMEOUT_SECONDS
) -> pb.ReportLoadResponse:
    try:
        return session.stub.ReportLoad(request, timeout=timeout, metadata=session.metadata)
    except grpc.RpcError as error:
        raise decode_error(error) from error


def _report_transfer(session: Session, request: pb.ReportTransferRequest, timeout: float) -> None:
    try:
        session.stub.ReportTransfer(request, timeout=timeout, metadata=session.metadata)
    except grpc.RpcError as error:
        raise decode_error(error) from error
