"""Requests of the wire, checked as a whole before anything is decided.

Every function raises `InvalidArgument` naming the field, the value and what was expected, or returns domain values that
need no further checks.
"""

from __future__ import annotations

import re

from google.protobuf.duration_pb2 import Duration

from weight_broker.errors import InvalidArgument
from weight_broker.kinds import TRAITS
from weight_broker.v1 import resources_pb2, weight_broker_service_pb2, weight_set_pb2
from weight_broker.wire import coverage_from_wire
from weight_brokerd.api.messages import PHASE_NAMES
from weight_brokerd.core.model import Arrival, FailureCause, IfAbsent, RankOfGroup, TransferPath
from weight_brokerd.kinds.place_request import text

MAX_EXTENSION_SECONDS = 24 * 3600.0
MAX_LOAD_GROUP_SIZE = 4096
MAX_PHASES = 64
MAX_TIMEOUT_SECONDS = 7 * 24 * 3600.0

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
_WEIGHT_SET_ID = re.compile(r"[0-9a-f]{32}")


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


def other_kinds(takes_host_memory: bool, device_kind: str) -> frozenset[str]:
    """Kinds besides `device_kind` from which an instance fills its memory itself."""
    if not takes_host_memory:
        return frozenset()
    return frozenset(name for name, traits in TRAITS.items() if not traits.broker_copies) - {device_kind}


def if_absent(value: weight_broker_service_pb2.IfAbsent.ValueType) -> IfAbsent:
    """What to do if no instance holds the weight set."""
    found = _IF_ABSENT.get(value)
    if found is None:
        raise InvalidArgument("if_absent", value, "IF_ABSENT_FAIL, IF_ABSENT_WAIT or IF_ABSENT_LOAD")
    return found


def path(value: resources_pb2.TransferPath.ValueType) -> TransferPath:
    """How the bytes reach the receiver."""
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
    """The receiver's report of a transfer that succeeded."""
    verified = coverage_from_wire(message.verified)
    if verified is None:
        raise InvalidArgument("succeeded.verified", message.verified, "DIGEST_COVERAGE_FULL or _SAMPLED")
    if len(message.phase_times) > MAX_PHASES:
        raise InvalidArgument("succeeded.phase_times", len(message.phase_times), f"at most {MAX_PHASES}")
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


def _duration(field: str, value: Duration) -> float:
    """Seconds. Refuses every form in which google.protobuf.Duration writes a negative duration."""
    if not 0 <= value.nanos < 1_000_000_000 or value.seconds < 0:
        shown = f"{value.seconds} s and {value.nanos} ns"
        raise InvalidArgument(field, shown, "a duration of 0 or more, with less than a second of nanoseconds")
    return value.seconds + value.nanos * 1e-9
