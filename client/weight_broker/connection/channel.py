"""The gRPC channel to the broker, and how its errors become exceptions."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import grpc
import grpc.experimental
from google.protobuf.message import DecodeError

from weight_broker.connection import room, standard_streams
from weight_broker.errors import (
    ERROR_DOMAIN,
    QUIESCED_METADATA,
    TOUCHED_METADATA,
    BrokerError,
    Reason,
    from_reason,
)
from weight_broker.v1.error_details_pb2 import RpcErrorInfo, RpcStatus

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_STATUS_DETAILS_KEY = "grpc-status-details-bin"
_ERROR_INFO_TYPE = "google.rpc.ErrorInfo"

_OPTIONS = (
    # A channel shared through the process-wide pool breaks in forked children.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # In gRPC's core this is also the limit of one attempt. A unix socket refuses at once, so a long limit costs nothing
    # and helps a broker on a busy host.
    ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
    # A broker that hangs answers no HTTP/2 ping. Pings run only during a call.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    # The calling thread reads streams, not a thread of gRPC's: faster, and safe in a fork.
    (grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1),
)

# Reasons for a status without details, which comes from gRPC itself or from a foreign server.
_REASONS = {
    grpc.StatusCode.UNAVAILABLE: Reason.BROKER_UNAVAILABLE,
    grpc.StatusCode.CANCELLED: Reason.BROKER_UNAVAILABLE,
    grpc.StatusCode.UNAUTHENTICATED: Reason.NOT_ATTACHED,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Reason.LIMIT_EXCEEDED,
    grpc.StatusCode.INVALID_ARGUMENT: Reason.INVALID_ARGUMENT,
}

_LATE = {
    Reason.BROKER_UNAVAILABLE: "the broker did not answer before the deadline",
    Reason.ACQUIRE_TIMEOUT: "the deadline passed before the weights were in place",
    Reason.RETRACT_TIMEOUT: "the deadline passed while readers were still running; no new ones are let in, call again",
}


def open_channel(socket_path: str | Path) -> grpc.Channel:
    """A channel to the unix socket; it connects on first use. Raises `BrokerUnavailable` if this process lacks what
    gRPC needs."""
    standard_streams.occupy()
    room.require_for_channel()
    return grpc.insecure_channel(f"unix:{quote(str(Path(socket_path).absolute()))}", options=_OPTIONS)


def decode_error(
    error: grpc.RpcError,
    *,
    on_deadline: Reason = Reason.BROKER_UNAVAILABLE,
    touched: bool = False,
    broker_writes: bool = False,
) -> BrokerError:
    """The exception for a failed call. `on_deadline` is the reason if gRPC's own deadline passed. `broker_writes`: the
    broker was writing to the caller's memory, and only an answer of the broker says that the writing has ended."""
    code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
    text = (error.details() if isinstance(error, grpc.Call) else None) or code.name
    information = _error_information(error)
    if information is not None:
        try:
            reason = Reason(information.reason)
        except ValueError:  # a newer broker
            reason = _REASONS.get(code, Reason.INTERNAL)
        metadata = dict(information.metadata)
        touched = touched or metadata.pop(TOUCHED_METADATA, "") == "true"
        quiesced = metadata.pop(QUIESCED_METADATA, "") != "false"
        return from_reason(reason, text, metadata=metadata, touched=touched, quiesced=quiesced)
    touched, quiesced = touched or broker_writes, not broker_writes
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return late(on_deadline, touched=touched, quiesced=quiesced)
    reason = _REASONS.get(code, Reason.INTERNAL)
    return from_reason(reason, f"{code.name}: {text}", touched=touched, quiesced=quiesced)


def late(reason: Reason, *, touched: bool = False, quiesced: bool = True) -> BrokerError:
    """The exception for a call that its deadline has ended."""
    return from_reason(reason, _LATE[reason], touched=touched, quiesced=quiesced)


def _error_information(error: grpc.RpcError) -> RpcErrorInfo | None:
    if not isinstance(error, grpc.Call):
        return None
    for name, value in error.trailing_metadata() or ():
        if name != _STATUS_DETAILS_KEY or not isinstance(value, bytes):
            continue
        try:
            for detail in RpcStatus.FromString(value).details:
                if detail.type_url.rpartition("/")[2] == _ERROR_INFO_TYPE:
                    information = RpcErrorInfo.FromString(detail.value)
                    if information.domain == ERROR_DOMAIN:
                        return information
        except DecodeError:
            return None
    return None
