"""Instances, acquisitions and cold-load leases: what is wanted, and by whom.

Times are seconds of one monotonic clock that the caller reads.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from weight_broker.key import WeightSetKey
from weight_broker.layout import Layout
from weight_brokerd.core.sources import Holder, SourceRef


class InstanceState(enum.StrEnum):
    ATTACHED = "attached"
    DISCONNECTED = "disconnected"


class TransferPath(enum.StrEnum):
    """How the bytes of a transfer reach the receiver."""

    COPY = "copy"
    ZERO_COPY = "zero_copy"
    STAGED = "staged"


class DataPlane(enum.StrEnum):
    """What moves the bytes of a transfer."""

    UNKNOWN = "unknown"
    """Not routed yet."""
    LOCAL = "local"
    PEER_COPY = "peer_copy"
    DATASYSTEM = "datasystem"

    @property
    def is_known(self) -> bool:
        """Whether something moves the bytes."""
        return self is not DataPlane.UNKNOWN


class IfAbsent(enum.StrEnum):
    """What an acquisition wants if no instance holds the weight set."""

    FAIL = "fail"
    WAIT = "wait"
    LOAD = "load"


class FailureCause(enum.StrEnum):
    SOURCE_UNREACHABLE = "source_unreachable"
    DIGEST_MISMATCH = "digest_mismatch"
    RECEIVER = "receiver"


class Remedy(enum.Enum):
    """What a receiver on whose side a transfer failed may do, to succeed with the same call."""

    NONE = enum.auto()
    STAGING = enum.auto()
    """Offer to copy its memory, which the driver does not map."""
    STAGE_CONNECTION = enum.auto()
    """Open a stage connection, as the one before has ended."""


class Finding(enum.StrEnum):
    """What the check of a publication's content against its digests has found."""

    DAMAGED = "damaged"
    INTACT = "intact"
    UNCHECKED = "unchecked"
    """The broker cannot read the memory, or cannot compute any of the digests."""


class WaitReason(enum.StrEnum):
    COLD_LOAD = "cold_load"
    SOURCES_BUSY = "sources_busy"
    LOAD_GROUP = "load_group"
    REGISTERING = "registering"


@dataclass(frozen=True, slots=True, order=True)
class Process:
    """The process behind one or more instances: whom limits and reports are counted for."""

    uid: int
    name: str
    """Its pid; the instance id where the broker cannot see the process."""


@dataclass(slots=True)
class Instance:
    """One inference process, attached to this host's broker."""

    instance_id: str
    name: str
    pid: int
    uid: int
    gid: int
    attached_at: float
    state: InstanceState = InstanceState.ATTACHED

    @property
    def process(self) -> Process:
        return Process(self.uid, str(self.pid) if self.pid > 0 else self.instance_id)


@dataclass(frozen=True, slots=True)
class RankOfGroup:
    """Which rank of which engine an instance is."""

    group_id: str
    member: int
    size: int
    assembly_seconds: float = 0.0
    """How long to wait until the other ranks have asked."""


@dataclass(slots=True)
class Acquisition:
    """One acquire call."""

    acquisition_id: str
    key: WeightSetKey
    layout: Layout | None
    """The receiver's layout; None accepts any (zero-copy)."""
    instance_id: str
    if_absent: IfAbsent
    device_kind: str
    device_id: str
    path: TransferPath
    begun_at: float
    deadline: float
    failed_sources: dict[SourceRef, str] = field(default_factory=dict)
    """Sources that were tried and failed, with the reason."""
    saw_wrong_bytes: bool = False
    touched: bool = False
    """Whether the broker may have written to the receiver's memory."""
    transfer_id: str = ""
    """The transfer that is reserved or runs; empty while the acquisition waits."""
    last_wait: tuple[WaitReason, int] | None = None
    """Reason and fencing token of the last Wait that was sent; equal ones are not repeated."""
    rank: RankOfGroup | None = None
    """None unless the instance's engine has several ranks."""
    other_kinds: frozenset[str] = frozenset()
    """Kinds of memory besides `device_kind` from which the receiver fills its own."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """What the receiver reports of a transfer that succeeded."""

    size_bytes: int
    phase_seconds: tuple[tuple[str, float], ...]
    """Name of a phase (that of the wire, without its prefix, in lower case) and its seconds, in order."""
    verified: str
    """How much of the content was verified."""


@dataclass(frozen=True, slots=True)
class DamageReport:
    """A receiver's claim that a source delivered other bytes than were published."""

    transfer_id: str
    instance_id: str
    """The receiver."""
    process: Process
    gid: int
    detail: str
    """The receiver's words."""


@dataclass(frozen=True, slots=True)
class ColdLoadLease:
    """The right and duty of one instance to load a weight set from disk."""

    weight_set_id: str
    fencing_token: int
    holder: Holder
    acquired_at: float
    expires_at: float


@dataclass(frozen=True, slots=True)
class LeaseClaim:
    """The answer to a claim."""

    lease: ColdLoadLease
    """The current lease, of the claimant or of another instance."""
    granted: bool
    """False if another instance held the lease already."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the broker bounds."""

    readers_per_publication: int = 16
    publications: int = 20_000
    instances: int = 4096
    instances_per_process: int = 4096
    layout_tensors: int = 8_000_000
    layout_tensors_per_process: int = 2_000_000
    cold_load_lease_seconds: float = 1800.0
    transfers_remembered: int = 256
