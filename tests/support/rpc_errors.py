"""What a refused call must look like, whatever was wrong with it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from weight_broker.errors import ERROR_DOMAIN, TABLE, Reason

_LEAK = re.compile(
    r"Traceback|site-packages|/weight_brokerd|\.py\b|<class|object at 0x|Error\(|Exception|Unexpected|dataclass"
)


@dataclass(frozen=True)
class Refusal:
    """A call's error, decoded."""

    code: grpc.StatusCode
    message: str
    reason: Reason
    metadata: dict[str, str]

    @property
    def field(self) -> str:
        """The field that is wrong, as the metadata name it."""
        return self.metadata.get("field", "")


def refusal_of(error: grpc.RpcError) -> Refusal:
    """The error, if it is one of docs/ERRORS.md with everything that belongs to it; fails otherwise."""
    assert isinstance(error, grpc.Call)
    code, text = error.code(), error.details() or ""
    status = rpc_status.from_call(error)
    assert status is not None, f"{code.name} without details: {text!r}"
    [detail] = [one for one in status.details if one.Is(error_details_pb2.ErrorInfo.DESCRIPTOR)]
    information = error_details_pb2.ErrorInfo()
    assert detail.Unpack(information), f"{code.name} has {detail.type_url}, not ErrorInfo"
    assert information.domain == ERROR_DOMAIN
    reason = Reason(information.reason)
    assert TABLE[reason].code == code.name, f"{reason} travels as {code.name}"
    assert code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), text
    assert text, f"{reason} without a message"
    refusal = Refusal(code, text, reason, dict(information.metadata))
    for shown in (text, *refusal.metadata.values()):
        assert not _LEAK.search(shown), f"leaks the broker's inside: {shown!r}"
    if reason is Reason.INVALID_ARGUMENT:
        assert refusal.field, f"names no field: {text!r}"
    return refusal


DEFECTS = (
    '"internal_error"',
    "Traceback",
    "attach_request_failed",
    "attendance_failed",
    "directory_claim_failed",
    "lease_release_failed",
)
"""What the log shows of a defect."""


def assert_no_defect(log: str) -> None:
    """The daemon has met nothing that it was not written for."""
    for sign in DEFECTS:
        position = log.find(sign)
        assert position < 0, f"the daemon's log has a defect:\n{log[max(0, position - 500) : position + 3000]}"
