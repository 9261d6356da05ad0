"""What every data plane does: move a weight set from one place to another, or say exactly how far it got."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from weight_broker.layout import Layout
from weight_brokerd.cards.messages import ImportRegion
from weight_brokerd.core.model import DataPlane, FailureCause, TransferPath

Way = DataPlane | TransferPath
"""How a weight set moves: the data plane, or for what is staged that path."""


@dataclass(frozen=True, slots=True)
class StagedBy:
    """Who copies between a bucket and memory that the broker does not map."""

    instance_id: str
    stage_id: str
    """The instance's name for the tensors."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a weight set lies, or is to lie, in device memory."""

    card: str
    """Physical identity of the device."""
    regions: tuple[ImportRegion, ...]
    """Their ids are unique on this host."""
    placements: Sequence[tuple[int, int]]
    """(index of the region, offset in bytes) of each tensor, in the layout's order."""
    staged: StagedBy | None = None
    """Set instead of regions and placements where the broker does not map the memory."""


class MoveFailed(Exception):
    """The bytes did not all arrive. Nobody writes to the destination any more, unless `quiesced` is False."""

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


class BulkPlane(Protocol):
    """Moves weight sets in device memory."""

    async def move(
        self, layout: Layout, source: Place, destination: Place, *, timeout: float, peer: str
    ) -> Mapping[str, float]:
        """Fills `destination` from `source` within `timeout` seconds; seconds by phase of the wire, in lower case.
        `peer` names the two ends, for statistics.

        Raises `MoveFailed`. May be cancelled: what was writing has ended when the cancellation comes out, or
        `MoveFailed` with `quiesced` False is raised instead.
        """
        ...
