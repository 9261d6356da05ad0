"""A directory arbitrates cold-load leases for the brokers that share it.

Every call may take a round trip, or fail. A directory of one host lists no sources: the broker's own publications are
the list.
"""

from __future__ import annotations

from typing import Protocol

from weight_brokerd.core.model import ColdLoadLease, LeaseClaim
from weight_brokerd.core.sources import Holder


class DirectoryEvents(Protocol):
    """Events of a directory."""

    def lease_ended(self, lease: ColdLoadLease) -> None:
        """The lease was released, has expired, or ended with its holder's host."""


class Directory(Protocol):
    """Who may load from disk, as far as the directory reaches."""

    name: str

    def subscribe(self, events: DirectoryEvents) -> None:
        """Report to `events` from now on. Called once, before anything else."""

    async def claim(self, weight_set_id: str, claimant: Holder) -> LeaseClaim:
        """The lease goes to the claimant if it is free."""

    async def extend(self, lease: ColdLoadLease, seconds: float) -> ColdLoadLease:
        """The lease with an end that is at least `seconds` away. Raises `LeaseLost`."""

    async def release(self, lease: ColdLoadLease) -> None:
        """The lease has ended when this returns; `lease_ended` was called unless it had ended before. Idempotent."""

    def close(self) -> None:
        """Report nothing any more."""
