"""What the coordinator decides. Whoever drives it carries the decisions out, in order."""

from __future__ import annotations

from dataclasses import dataclass

from weight_broker.errors import BrokerError
from weight_brokerd.core.model import Arrival, ColdLoadLease, Publication, Transfer, WaitReason


@dataclass(frozen=True, slots=True)
class Grant:
    """The acquisition may read from the transfer's source."""

    acquisition_id: str
    transfer: Transfer


@dataclass(frozen=True, slots=True)
class Wait:
    """The acquisition waits."""

    acquisition_id: str
    reason: WaitReason
    lease: ColdLoadLease | None


@dataclass(frozen=True, slots=True)
class TellColdLoad:
    """The acquisition ends: its instance is to load from disk."""

    acquisition_id: str
    lease: ColdLoadLease


@dataclass(frozen=True, slots=True)
class Complete:
    """The acquisition ends: every byte is in place."""

    acquisition_id: str
    transfer: Transfer
    arrival: Arrival


@dataclass(frozen=True, slots=True)
class Fail:
    """The acquisition ends with an error."""

    acquisition_id: str
    error: BrokerError


@dataclass(frozen=True, slots=True)
class Map:
    """The publication's memory is to be mapped; answer with `Coordinator.mapped` or `mapping_failed`."""

    publication: Publication


@dataclass(frozen=True, slots=True)
class Unmap:
    """The publication is gone: give its memory up."""

    publication: Publication


@dataclass(frozen=True, slots=True)
class EndTransfer:
    """The transfer has ended: give up what it held. If the broker was moving its bytes, that is to end now."""

    transfer: Transfer


@dataclass(frozen=True, slots=True)
class ClaimLease:
    """The directory is to be asked for the cold-load lease; answer with `Coordinator.lease_claimed`."""

    weight_set_id: str
    instance_id: str


@dataclass(frozen=True, slots=True)
class ReleaseLease:
    """The directory is to be told that the lease has ended; answer with `Coordinator.lease_free`."""

    lease: ColdLoadLease


@dataclass(frozen=True, slots=True)
class WeightSetChanged:
    """Watchers of the weight set are to be told."""

    weight_set_id: str


@dataclass(frozen=True, slots=True)
class InstanceChanged:
    """Watchers of the instance are to be told."""

    instance_id: str


@dataclass(frozen=True, slots=True)
class TransferChanged:
    """Watchers of the transfer are to be told."""

    transfer: Transfer


Decision = (
    Grant
    | Wait
    | TellColdLoad
    | Complete
    | Fail
    | Map
    | Unmap
    | EndTransfer
    | ClaimLease
    | ReleaseLease
    | WeightSetChanged
    | InstanceChanged
    | TransferChanged
)
