"""The things the broker knows: instances, publications, acquisitions, transfers and cold-load leases.

Times are seconds of one monotonic clock that the caller reads.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from weight_broker.key import WeightSetKey
from weight_broker.kinds import TRAITS
from weight_broker.layout import Layout


class InstanceState(enum.StrEnum):
    """State of an instance."""

    ATTACHED = "attached"
    DISCONNECTED = "disconnected"


class PublicationState(enum.StrEnum):
    """State of a publication; `registry.TRANSITIONS` has the edges."""

    REGISTERING = "registering"
    RESIDENT = "resident"
    RETRACTING = "retracting"
    GONE = "gone"
    QUARANTINED = "quarantined"


class TransferState(enum.StrEnum):
    """State of a transfer."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


class TransferPath(enum.StrEnum):
    """How the bytes of a transfer reach the receiver."""

    COPY = "copy"
    ZERO_COPY = "zero_copy"
    STAGED = "staged"


class DataPlane(enum.StrEnum):
    """What moves the bytes of a transfer."""

    LOCAL = "local"
    DATASYSTEM = "datasystem"


class IfAbsent(enum.StrEnum):
    """What an acquisition wants if nobody holds the weight set."""

    FAIL = "fail"
    WAIT = "wait"
    LOAD = "load"


class FailureCause(enum.StrEnum):
    """Why a transfer failed."""

    SOURCE_UNREACHABLE = "source_unreachable"
    DIGEST_MISMATCH = "digest_mismatch"
    RECEIVER = "receiver"


class WaitReason(enum.StrEnum):
    """Why an acquisition waits."""

    COLD_LOAD = "cold_load"
    SOURCES_BUSY = "sources_busy"
    LOAD_GROUP = "load_group"
    REGISTERING = "registering"


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


@dataclass(frozen=True, slots=True)
class RankOfGroup:
    """Which rank of which engine somebody is."""

    group_id: str
    member: int
    size: int
    assembly_seconds: float = 0.0
    """How long the other ranks may take to ask too."""


@dataclass(slots=True)
class Publication:
    """One instance's weight set, offered as a source."""

    publication_id: str
    key: WeightSetKey
    layout: Layout
    generation: int
    instance_id: str
    instance_name: str
    host_id: str
    device_kind: str
    device_id: str
    reader_limit: int
    published_at: float
    request_id: str
    fencing_token: int
    """Of the cold-load lease that it fulfils; 0 if none."""
    state: PublicationState = PublicationState.REGISTERING
    readers: set[str] = field(default_factory=set)
    """Ids of the transfers that read from it now."""
    is_staged: bool = False
    """Whether its instance copies it, because the broker does not map its memory."""
    served_count: int = 0
    quarantine_reason: str = ""
    rank: RankOfGroup | None = None
    """Of its engine, if that has several."""

    @property
    def group_id(self) -> str:
        """Its engine, if that has several ranks; else empty."""
        return self.rank.group_id if self.rank is not None else ""

    @property
    def weight_set_id(self) -> str:
        """Id of its weight set."""
        return self.key.id


@dataclass(frozen=True, slots=True)
class Offer:
    """A request to publish, validated."""

    key: WeightSetKey
    layout: Layout
    instance_id: str
    device_kind: str
    device_id: str
    fencing_token: int
    request_id: str
    rank: RankOfGroup | None = None
    is_staged: bool = False


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
    failed_sources: dict[str, str] = field(default_factory=dict)
    """Publications that were tried and failed, with the reason."""
    saw_wrong_bytes: bool = False
    touched: bool = False
    """Whether the broker may have written to the receiver's memory."""
    transfer_id: str = ""
    """The running transfer, if any."""
    told: tuple[WaitReason, int] | None = None
    """What it was last told to wait for, so that it is told once."""
    rank: RankOfGroup | None = None
    """Of its engine, if that has several."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """What the receiver reports of a transfer that succeeded."""

    size_bytes: int
    phase_seconds: tuple[tuple[str, float], ...]
    """Name of a phase (that of the wire, without its prefix, in lower case) and its seconds, in order."""
    verified: str
    """How much of the content was verified."""


@dataclass(slots=True)
class Transfer:
    """The movement of one weight set into one instance."""

    number: int
    """Grows with every transfer."""
    acquisition_id: str
    publication: Publication
    """The source; it may be gone before the transfer ends, if its instance dies."""
    receiver_instance_id: str
    path: TransferPath
    data_plane: DataPlane
    started_at: float
    is_moved: bool = False
    """Whether the broker has moved every byte; the receiver verifies them."""
    state: TransferState = TransferState.RUNNING
    ended_at: float = 0.0
    failure: str = ""

    @property
    def transfer_id(self) -> str:
        """Its id."""
        return f"transfer-{self.number}"

    @property
    def is_brokers(self) -> bool:
        """Whether the broker moves the bytes; on host memory the receiver does."""
        return TRAITS[self.publication.device_kind].broker_copies


@dataclass(frozen=True, slots=True)
class ColdLoadLease:
    """The right and duty of one instance to load a weight set from disk."""

    weight_set_id: str
    fencing_token: int
    instance_id: str
    instance_name: str
    host_id: str
    acquired_at: float
    expires_at: float


@dataclass(frozen=True, slots=True)
class LeaseClaim:
    """The answer to a claim."""

    lease: ColdLoadLease
    """The lease as it is held now."""
    granted: bool
    """True if this claim won it; False if it was held already."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the broker bounds."""

    readers_per_publication: int = 16
    publications: int = 20_000
    instances: int = 4096
    cold_load_lease_seconds: float = 1800.0
    transfers_remembered: int = 256
