"""What every data plane does: move a weight set from one place to another, or say exactly how far it got."""

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
from weight_brokerd.core.model import FailureCause

T = TypeVar("T")
PhaseSeconds = Mapping[str, float]
"""Seconds of each phase, by its name on the wire without its prefix, in lower case."""


class PlaneName(enum.StrEnum):
    """The ways in which weights move."""

    HOST = "host"
    """The receiver copies or maps host memory itself; no data plane takes part."""
    COPY = "copy"
    DATASYSTEM = "datasystem"
    STAGED = "staged"


@dataclass(frozen=True, slots=True)
class StagedBy:
    """Who copies between a staging buffer and memory that the broker does not map."""

    instance_id: str
    stage_id: str
    """The instance's name for the tensors."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a weight set lies, or is to lie: what the broker may map, what its owner may copy, or both."""

    kind: str
    device_id: str
    """Physical identity of the device; empty for host memory."""
    regions: tuple[ImportRegion, ...] = ()
    """What the broker may map. Their ids are unique on this host, those of host memory among the owner's."""
    placements: Sequence[Placement] = ()
    """Of each tensor in the regions, in the layout's order."""
    stage: StagedBy | None = None
    """Who may copy instead."""
    granted: bytes = b""
    """What a receiver that copies for itself learns of the place: a serialized Granted, ten times smaller than the
    message. Empty for device memory: with the handles anybody could map it."""

    @property
    def is_staged(self) -> bool:
        """Whether only its owner can copy it."""
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
"""Of a receiver that copies for itself."""


class MoveFailed(Exception):
    """The bytes did not all arrive. Nobody writes to the destination any more, unless `quiesced` is False.

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
    ) -> None:
        """`needs_staging`: the driver does not let the receiver's memory be mapped; its owner may copy it instead."""
        super().__init__(message)
        self.needs_staging = needs_staging
        self.cause = cause
        self.touched = touched
        self.quiesced = quiesced


class DataPlane(Protocol):
    """Moves a weight set from one place to another, or says how far it got."""

    @property
    def name(self) -> PlaneName:
        """For the log."""

    async def move(
        self, layout: Layout, source: Place, destination: Place, *, timeout: float, peer: str
    ) -> PhaseSeconds:
        """Return when every byte is there and nothing writes any more, within `timeout` seconds. `peer` names the two
        ends, for statistics.

        Raises `MoveFailed`. May be cancelled: nothing writes when the cancellation comes out, or `MoveFailed` with
        `quiesced` False is raised instead.
        """
        ...


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

    async def close_staging_buffer(self, card: str, region_id: str) -> None:
        """Free a staging buffer that no instance has mapped. Idempotent; never fails."""
