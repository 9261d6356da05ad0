"""Data planes: each moves a weight set from one place to another, or says exactly how far the bytes got."""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from weight_broker.kinds import EMPTY_KIND
from weight_broker.layout import Layout
from weight_brokerd.cards.borrowed import BorrowedReceiver
from weight_brokerd.cards.messages import Done, ImportRegion
from weight_brokerd.cards.offers import OfferEnd
from weight_brokerd.cards.plan.blobs import BlobList
from weight_brokerd.cards.plan.pieces import Placement
from weight_brokerd.cards.receivers import Reserve
from weight_brokerd.core import model
from weight_brokerd.core.model import FailureCause, Remedy

T = TypeVar("T")
PhaseSeconds = Mapping[str, float]
"""Seconds by phase: its name on the wire in lower case, without its prefix."""


class PlaneName(enum.StrEnum):
    """The ways in which weights move."""

    HOST = "host"
    """The receiver copies or maps host memory itself; no data plane takes part."""
    COPY = "copy"
    PEER_COPY = "peer_copy"
    DATASYSTEM = "datasystem"
    STAGED = "staged"


@dataclass(frozen=True, slots=True)
class StagedBy:
    """The instance that copies between a staging buffer and memory that the broker does not map."""

    instance_id: str
    stage_id: str
    """The instance's name for the tensors."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a weight set lies or will lie: memory that the broker may map, that its owner may copy, or both."""

    kind: str
    device_id: str
    """Physical identity of the device; empty for host memory."""
    regions: tuple[ImportRegion, ...] = ()
    """Memory that the broker may map. Ids are unique on this host; those of host memory within the owner."""
    placements: Sequence[Placement] = ()
    """Position of each tensor in the regions, in the layout's order."""
    stage: StagedBy | None = None
    """The owner's offer to copy instead."""
    granted: bytes = b""
    """The place for a receiver that copies itself: a serialized Granted, ten times smaller than the message. Empty for
    device memory: any process with the handles could map it."""

    @property
    def is_staged(self) -> bool:
        """Whether only the owner can copy the memory."""
        return self.stage is not None and not self.regions

    @property
    def as_staged(self) -> Place:
        """The place if the broker does not map it."""
        return replace(self, regions=(), placements=())

    @property
    def as_mapped(self) -> Place:
        """The place if the broker maps it."""
        return replace(self, stage=None)


NOWHERE = Place(EMPTY_KIND, "")
"""The place of a receiver that copies itself."""


class MoveFailed(Exception):
    """The bytes did not all arrive. Nothing writes to the destination any more, unless `quiesced` is False.

    `cause` is SOURCE_UNREACHABLE only if the failure demonstrably came from the source's side: another source may do.
    """

    def __init__(
        self,
        message: str,
        *,
        cause: FailureCause,
        touched: bool,
        quiesced: bool = True,
        needs_staging: bool = False,
        lacks_stage: bool = False,
        instead: DataPlane | None = None,
    ) -> None:
        """`needs_staging`: the driver refuses to map the receiver's memory; its owner may copy it instead.
        `lacks_stage`: the receiver's stage connection has ended. `instead`: nothing was touched, and this plane may
        move the bytes."""
        super().__init__(message)
        self.instead = instead
        self.needs_staging = needs_staging
        self.lacks_stage = lacks_stage
        self.cause = cause
        self.touched = touched
        self.quiesced = quiesced

    @property
    def remedy(self) -> Remedy:
        """What lets the receiver succeed if it repeats its call."""
        if self.needs_staging:
            return Remedy.STAGING
        return Remedy.STAGE_CONNECTION if self.lacks_stage else Remedy.NONE


class DataPlane(Protocol):
    """Moves a weight set from one place to another, or says how far it got."""

    @property
    def name(self) -> PlaneName:
        """For the log, and with the places for listings (`shown_as`)."""

    async def move(
        self, layout: Layout, source: Place, destination: Place, *, timeout: float, peer: str
    ) -> PhaseSeconds:
        """Return when every byte is there and nothing writes any more, within `timeout` seconds. `peer` names the two
        ends, for statistics.

        Raises `MoveFailed`. May be cancelled: nothing writes when the cancellation comes out, or `MoveFailed` with
        `quiesced` False is raised instead.
        """
        ...


_SHOWN = {
    PlaneName.HOST: model.DataPlane.LOCAL,
    PlaneName.COPY: model.DataPlane.LOCAL,
    PlaneName.PEER_COPY: model.DataPlane.PEER_COPY,
    PlaneName.DATASYSTEM: model.DataPlane.DATASYSTEM,
}


def shown_as(name: PlaneName, source: Place, destination: Place) -> model.DataPlane:
    """What reports, listings and metrics say. Between staging buffers bytes move within a device, or through the
    datasystem; that they are staged is the transfer's path."""
    if name is PlaneName.STAGED:
        within_device = source.device_id == destination.device_id
        return model.DataPlane.LOCAL if within_device else model.DataPlane.DATASYSTEM
    return _SHOWN[name]


class Cards(Protocol):
    """The cards of one kind, as data planes use them. All methods raise CardError."""

    async def register(self, card: str, region: ImportRegion) -> None:
        """Make a region of a publication readable. Idempotent."""

    async def offer(self, card: str, key: str, blobs: BlobList, *, peer: str = "") -> Done:
        """Let one reader fetch registered memory under a fresh key."""
        ...

    async def withdraw(self, card: str, key: str, end: OfferEnd) -> Done:
        """End an offer whose reader has ended. Idempotent; never fails."""
        ...

    async def fetch(
        self,
        card: str,
        key: str,
        blobs: BlobList,
        regions: Sequence[ImportRegion],
        *,
        timeout: float,
        peer: str = "",
        reserve: Reserve | None = None,
    ) -> Done:
        """Fill blobs that lie in `regions` from an offer of another card; `reserve` makes the offer meanwhile."""
        ...

    async def lend(
        self,
        card: str,
        job: Callable[[BorrowedReceiver], Awaitable[T]],
        regions: Sequence[ImportRegion],
        *,
        buffer_bytes: int = 0,
        timeout: float,
    ) -> T:
        """Run a job of several steps with a receiver of the card that has the regions mapped."""
        ...

    async def make_staging_buffer(self, card: str, size: int) -> ImportRegion:
        """Make a staging buffer that an instance can import and fill, to be offered."""
        ...

    async def lend_staging_buffer(self, card: str, region_id: str, connection: int) -> None:
        """Let an instance map a staging buffer; `connection` is the descriptor of its stage connection."""

    async def close_staging_buffer(self, card: str, region_id: str) -> None:
        """Free a staging buffer that no instance has mapped. Idempotent; never fails."""
