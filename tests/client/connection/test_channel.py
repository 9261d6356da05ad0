"""What a failed call becomes."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2

from weight_broker.connection.channel import decode_error, open_channel
from weight_broker.errors import TABLE, AcquireTimeout, BrokerError, BrokerUnavailable, NotAttached, Reason


class FailedCall(grpc.RpcError, grpc.Call):
    """A call as gRPC raises it."""

    def __init__(self, code: grpc.StatusCode, details: str, metadata: tuple[tuple[str, bytes], ...] = ()) -> None:
        self._code, self._details, self._metadata = code, details, metadata

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:  # type: ignore[override]
        return self._metadata

    initial_metadata = is_active = time_remaining = cancel = add_callback = NotImplemented


def rich(code: grpc.StatusCode, message: str, *, domain: str = "weight-broker", **information: str) -> FailedCall:
    """A call that failed with google.rpc's own messages."""
    status = status_pb2.Status(code=code.value[0], message=message)
    reason = information.pop("reason")
    status.details.append(AnyMessage(type_url="type.googleapis.com/google.rpc.Help"))
    detail = AnyMessage()
    detail.Pack(error_details_pb2.ErrorInfo(reason=reason, domain=domain, metadata=information))
    status.details.append(detail)
    return FailedCall(code, message, (("grpc-status-details-bin", status.SerializeToString()),))


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_becomes_its_exception_with_its_metadata(reason: Reason) -> None:
    row = TABLE[reason]
    failed = rich(getattr(grpc.StatusCode, row.code), "what happened", reason=reason, field="key.model")
    error = decode_error(failed, touched=True)
    assert type(error) is row.exception
    assert (error.reason, error.message, error.touched, error.quiesced) == (reason, "what happened", True, True)
    assert error.metadata == {"field": "key.model"}


@pytest.mark.parametrize(
    ("code", "exception"),
    [
        (grpc.StatusCode.UNAVAILABLE, BrokerUnavailable),
        (grpc.StatusCode.CANCELLED, BrokerUnavailable),
        (grpc.StatusCode.UNAUTHENTICATED, NotAttached),
        (grpc.StatusCode.DEADLINE_EXCEEDED, AcquireTimeout),
        (grpc.StatusCode.UNIMPLEMENTED, BrokerError),
        (grpc.StatusCode.UNKNOWN, BrokerError),
    ],
)
def test_a_status_of_grpc_itself_has_an_exception_too(code: grpc.StatusCode, exception: type[BrokerError]) -> None:
    error = decode_error(FailedCall(code, "text"), on_deadline=Reason.ACQUIRE_TIMEOUT)
    assert type(error) is exception
    assert not error.touched


def test_details_of_another_domain_or_that_cannot_be_read_are_not_ours() -> None:
    foreign = rich(grpc.StatusCode.UNAVAILABLE, "text", domain="example.com", reason="INTEGRITY_ERROR")
    assert decode_error(foreign).reason is Reason.BROKER_UNAVAILABLE
    broken = FailedCall(grpc.StatusCode.UNAVAILABLE, "text", (("grpc-status-details-bin", b"\xff\xff"),))
    assert decode_error(broken).reason is Reason.BROKER_UNAVAILABLE


def test_a_reason_of_a_newer_broker_falls_back_to_its_status() -> None:
    newer = rich(grpc.StatusCode.UNAVAILABLE, "text", reason="NEW_REASON", why="new")
    error = decode_error(newer)
    assert (error.reason, error.metadata) == (Reason.BROKER_UNAVAILABLE, {"why": "new"})


def test_a_socket_path_may_have_any_characters() -> None:
    open_channel("/tmp/a b%20c?d#e/broker.sock").close()
