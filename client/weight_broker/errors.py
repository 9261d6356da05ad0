"""All errors, in one tree and one table.

`Reason` is the wire's vocabulary (`google.rpc.ErrorInfo.reason`); `TABLE` says for each reason which gRPC status
carries it, which exception the caller gets and what to do. docs/ERRORS.md is checked against the table.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

ERROR_DOMAIN = "weight-broker"
TOUCHED_METADATA = "touched"
"""In ErrorInfo: "true" if the broker may have written to the receiver's memory."""
QUIESCED_METADATA = "quiesced"
"""In ErrorInfo: "false" if a transfer may still write to that memory."""
_WITHOUT_STAGE = {"connection": "stage"}
"""In ErrorInfo of NOT_ATTACHED: only the stage connection is missing."""


class Reason(enum.StrEnum):
    """Why a call failed."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    NOT_ATTACHED = "NOT_ATTACHED"
    NOT_ADMINISTRATOR = "NOT_ADMINISTRATOR"
    BROKER_UNAVAILABLE = "BROKER_UNAVAILABLE"
    DRAINING = "DRAINING"
    WEIGHTS_NOT_FOUND = "WEIGHTS_NOT_FOUND"
    LAYOUT_MISMATCH = "LAYOUT_MISMATCH"
    ACQUIRE_TIMEOUT = "ACQUIRE_TIMEOUT"
    TRANSFER_FAILED = "TRANSFER_FAILED"
    TRANSFER_NOT_FOUND = "TRANSFER_NOT_FOUND"
    INTEGRITY_ERROR = "INTEGRITY_ERROR"
    LOAD_GROUP_FAILED = "LOAD_GROUP_FAILED"
    PUBLISH_REFUSED = "PUBLISH_REFUSED"
    REGION_REFUSED = "REGION_REFUSED"
    LIMIT_EXCEEDED = "LIMIT_EXCEEDED"
    PUBLICATION_NOT_FOUND = "PUBLICATION_NOT_FOUND"
    RETRACT_TIMEOUT = "RETRACT_TIMEOUT"
    DRAIN_TIMEOUT = "DRAIN_TIMEOUT"
    LEASE_LOST = "LEASE_LOST"
    INTERNAL = "INTERNAL"


class BrokerError(RuntimeError):
    """Base of everything the client raises for a failed call.

    `touched` says whether any byte of the caller's tensors may have been written: if True, their content is
    undefined and must be loaded again. `quiesced` says whether all writing to them has certainly ended: if False, the
    storages must be discarded, not reused. `metadata` has the details by name (for example the field).
    """

    default_reason: ClassVar[Reason] = Reason.INTERNAL

    def __init__(
        self,
        message: str,
        *,
        reason: Reason | None = None,
        touched: bool = False,
        quiesced: bool = True,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason if reason is not None else self.default_reason
        self.touched = touched
        self.quiesced = quiesced
        self.metadata: dict[str, str] = dict(metadata or {})


class InvalidArgument(BrokerError, ValueError):
    """A field of the request is missing or wrong. `field` names it."""

    default_reason = Reason.INVALID_ARGUMENT

    def __init__(self, field: str, value: object, expected: str, *, hint: str = "") -> None:
        text = shown(value)
        message = f"{field} is {text}; expected {expected}" + (f". {hint}" if hint else "")
        super().__init__(message, metadata={"field": field, "value": text, "expected": expected})
        self.field = field


class BrokerUnavailable(BrokerError):
    """No broker answers, or it is draining. Load from disk."""

    default_reason = Reason.BROKER_UNAVAILABLE


class NotAttached(BrokerError):
    """The broker does not know this process (any more), or has no stage connection of it."""

    default_reason = Reason.NOT_ATTACHED

    @classmethod
    def without_stage(cls, detail: str = "") -> NotAttached:
        """For a process whose tensors are staged and whose stage connection has ended, which no argument can cure."""
        text = "this process has no stage connection; open one (ServeStage in attach.proto) and repeat the call"
        return cls(f"{text}: {detail}" if detail else text, metadata=_WITHOUT_STAGE)

    @property
    def lacks_stage(self) -> bool:
        """Whether the session goes on, and only its stage connection is missing."""
        return _WITHOUT_STAGE.items() <= self.metadata.items()


class NotAdministrator(BrokerError):
    """The caller may not administer the broker."""

    default_reason = Reason.NOT_ADMINISTRATOR


class WeightsNotFound(BrokerError):
    """No instance holds the weight set. Load from disk."""

    default_reason = Reason.WEIGHTS_NOT_FOUND


class LayoutMismatch(BrokerError):
    """The weight set is resident with another layout. `metadata["differences"]` names what differs."""

    default_reason = Reason.LAYOUT_MISMATCH


class AcquireTimeout(BrokerError):
    """The deadline passed before the weights were in place."""

    default_reason = Reason.ACQUIRE_TIMEOUT


class TransferFailed(BrokerError):
    """The bytes did not all arrive, from any source."""

    default_reason = Reason.TRANSFER_FAILED


class IntegrityError(TransferFailed):
    """Wrong bytes arrived. `metadata["tensors"]` names the tensors."""

    default_reason = Reason.INTEGRITY_ERROR


class LoadGroupFailed(BrokerError):
    """Another rank of the engine could not be served, so that none of them is. Load from disk."""

    default_reason = Reason.LOAD_GROUP_FAILED


class PublishRefused(BrokerError):
    """The weight set cannot be offered as a source; the message says why and what to do."""

    default_reason = Reason.PUBLISH_REFUSED


class PublicationNotFound(BrokerError):
    """No such publication."""

    default_reason = Reason.PUBLICATION_NOT_FOUND


class RetractTimeout(BrokerError):
    """Readers are still running; the memory must not change yet."""

    default_reason = Reason.RETRACT_TIMEOUT


class DrainTimeout(BrokerError):
    """Transfers still run after the timeout; the broker stays draining."""

    default_reason = Reason.DRAIN_TIMEOUT


class LeaseLost(BrokerError):
    """The caller does not hold the cold-load lease any more."""

    default_reason = Reason.LEASE_LOST


@dataclass(frozen=True)
class TableRow:
    """One reason: its gRPC status, its exception, and what to do."""

    code: str
    """Name of the gRPC status code."""
    exception: type[BrokerError]
    """What the Python client raises."""
    recovery: str
    """What the caller or the operator does about it."""


TABLE: Mapping[Reason, TableRow] = {
    Reason.INVALID_ARGUMENT: TableRow(
        "INVALID_ARGUMENT", InvalidArgument, "Correct the named field. Nothing changed in the broker."
    ),
    Reason.NOT_ATTACHED: TableRow(
        "UNAUTHENTICATED", NotAttached, "Attach first. The Python client does so and repeats the call once by itself."
    ),
    Reason.NOT_ADMINISTRATOR: TableRow(
        "PERMISSION_DENIED",
        NotAdministrator,
        "Call as root, as the broker's own user or as a member of the administrators' group (`admin_group`).",
    ),
    Reason.BROKER_UNAVAILABLE: TableRow(
        "UNAVAILABLE", BrokerUnavailable, "Load from disk. Look at `systemctl status weight-broker`."
    ),
    Reason.DRAINING: TableRow(
        "UNAVAILABLE", BrokerUnavailable, "Load from disk. The broker takes no new work until it is restarted."
    ),
    Reason.WEIGHTS_NOT_FOUND: TableRow(
        "NOT_FOUND", WeightsNotFound, "Load from disk, then publish. `weight-broker explain` says why it was a miss."
    ),
    Reason.LAYOUT_MISMATCH: TableRow(
        "FAILED_PRECONDITION",
        LayoutMismatch,
        "Load from disk. The differences are in the metadata; the key lacks an attribute that tells the two apart.",
    ),
    Reason.ACQUIRE_TIMEOUT: TableRow(
        "DEADLINE_EXCEEDED", AcquireTimeout, "Load from disk, or allow more time. See `touched` and `quiesced`."
    ),
    Reason.TRANSFER_FAILED: TableRow(
        "ABORTED", TransferFailed, "Load from disk: every source was tried. See `touched` and `quiesced`."
    ),
    Reason.TRANSFER_NOT_FOUND: TableRow(
        "NOT_FOUND", TransferFailed, "The transfer ended (deadline, retraction or restart); acquire again."
    ),
    Reason.INTEGRITY_ERROR: TableRow(
        "DATA_LOSS",
        IntegrityError,
        "Load from disk. The broker checks the source and quarantines it if it is damaged; if it is intact, suspect "
        "the receiver's own memory. `weight-broker status` shows both.",
    ),
    Reason.LOAD_GROUP_FAILED: TableRow(
        "ABORTED",
        LoadGroupFailed,
        "Load from disk, as all ranks of the engine do. The message says which rank failed and why.",
    ),
    Reason.PUBLISH_REFUSED: TableRow(
        "FAILED_PRECONDITION", PublishRefused, "Do what the message says, or go on without publishing."
    ),
    Reason.REGION_REFUSED: TableRow(
        "FAILED_PRECONDITION", PublishRefused, "Offer a sealed memfd of at least the declared size."
    ),
    Reason.LIMIT_EXCEEDED: TableRow(
        "RESOURCE_EXHAUSTED", PublishRefused, "Retract what is not needed, or raise the named limit."
    ),
    Reason.PUBLICATION_NOT_FOUND: TableRow(
        "NOT_FOUND", PublicationNotFound, "It is gone already, or belongs to another instance."
    ),
    Reason.RETRACT_TIMEOUT: TableRow(
        "DEADLINE_EXCEEDED", RetractTimeout, "Call again; do not change the memory before it returns."
    ),
    Reason.DRAIN_TIMEOUT: TableRow(
        "DEADLINE_EXCEEDED", DrainTimeout, "Wait and call again, or stop the broker: it ends the transfers."
    ),
    Reason.LEASE_LOST: TableRow(
        "FAILED_PRECONDITION", LeaseLost, "Another instance loads now, or has loaded. Publishing remains allowed."
    ),
    Reason.INTERNAL: TableRow("INTERNAL", BrokerError, "A defect in the broker: load from disk and report its log."),
}


def from_reason(
    reason: Reason,
    message: str,
    *,
    metadata: Mapping[str, str] | None = None,
    touched: bool = False,
    quiesced: bool = True,
) -> BrokerError:
    """The exception for `reason`."""
    exception = TABLE[reason].exception
    if exception is InvalidArgument:
        error: BrokerError = InvalidArgument.__new__(InvalidArgument)
        BrokerError.__init__(error, message, reason=reason, touched=touched, quiesced=quiesced, metadata=metadata)
        error.field = (metadata or {}).get("field", "")  # type: ignore[attr-defined]
        return error
    return exception(message, reason=reason, touched=touched, quiesced=quiesced, metadata=metadata)


def shown(value: object, limit: int = 120) -> str:
    """A value in an error message. Python writes no integer of thousands of digits."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        text = f"a value of type {type(value).__name__} that is too large to show"
    return text if len(text) <= limit else text[: limit - 3] + "..."
