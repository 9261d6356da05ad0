"""What the coordinator decides. The executor carries decisions out in the order in which they were made."""

from __future__ import annotations

from dataclasses import dataclass

from weight_broker.errors import BrokerError
from weight_brokerd.core.model import Arrival, ColdLoadLease, DamageReport, Finding, WaitReason
from weight_brokerd.core.publications import Publication
from weight_brokerd.core.transfers import Transfer

# Answers: what the caller of an acquisition receives.


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
class LoadFromDisk:
    """The acquisition ends: its instance loads from disk, with a lease."""

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


Ending = LoadFromDisk | Complete | Fail
Answer = Grant | Wait | Ending


# Actions: what core cannot do itself. Each one that can fail has an event that says how it ended.


@dataclass(frozen=True, slots=True)
class Hold:
    """Make the publication's memory readable. Ends with `Coordinator.held` or `not_held`."""

    publication: Publication


@dataclass(frozen=True, slots=True)
class Release:
    """The publication is gone: let go of its memory."""

    publication: Publication


@dataclass(frozen=True, slots=True)
class Reserve:
    """Keep the source readable for the transfer. Ends with `Coordinator.reserved` or `not_reserved`."""

    transfer: Transfer


@dataclass(frozen=True, slots=True)
class Move:
    """Move the transfer's bytes. Ends with `Coordinator.transfer_moved` or `transfer_failed`."""

    transfer: Transfer


@dataclass(frozen=True, slots=True)
class EndTransfer:
    """The transfer has ended: let go of what it held, and stop what still moves its bytes."""

    transfer: Transfer


@dataclass(frozen=True, slots=True)
class ClaimLease:
    """Ask the directory for the cold-load lease. Ends with `Coordinator.lease_claimed` or `claim_failed`."""

    weight_set_id: str
    instance_id: str


@dataclass(frozen=True, slots=True)
class ReleaseLease:
    """Give the lease back to the directory. Ends with `Coordinator.lease_ended`."""

    lease: ColdLoadLease


@dataclass(frozen=True, slots=True)
class CheckContent:
    """Compare the publication's content with its digests. Ends with `Coordinator.checked`."""

    publication: Publication


Action = Hold | Release | Reserve | Move | EndTransfer | ClaimLease | ReleaseLease | CheckContent


# Notices: what watchers see.


@dataclass(frozen=True, slots=True)
class WeightSetChanged:
    weight_set_id: str


@dataclass(frozen=True, slots=True)
class InstanceChanged:
    instance_id: str


@dataclass(frozen=True, slots=True)
class TransferChanged:
    transfer: Transfer


@dataclass(frozen=True, slots=True)
class DamageJudged:
    """What came of a report of damage."""

    report: DamageReport
    publication: Publication
    finding: Finding
    is_quarantined: bool
    is_suspect: bool
    """Whether the reports of this receiver keep proving false: its own memory may be damaged."""


Notice = WeightSetChanged | InstanceChanged | TransferChanged | DamageJudged

Decision = Answer | Action | Notice
Decisions = list[Decision]
