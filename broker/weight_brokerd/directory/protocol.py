"""What a directory does for the brokers that share it: it arbitrates cold-load leases.

Writes may take a round trip. A directory of one host lists nothing itself: the registry is its listing.
"""

from __future__ import annotations

from typing import Protocol

from weight_brokerd.core.model import ColdLoadLease, LeaseClaim


class DirectoryEvents(Protocol):
    """What a directory reports by itself."""

    def lease_free(self, lease: ColdLoadLease) -> None:
        """The lease ended: released, expired, or its holder's host is gone."""


class Directory(Protocol):
    """Who holds what, cluster-wide."""

    name: str

    def subscribe(self, events: DirectoryEvents) -> None:
        """Where to report to; called once, before anything else."""

    async def claim_lease(self, weight_set_id: str, *, instance_id: str, instance_name: str) -> LeaseClaim:
        """Claims the lease for an instance of this host."""

    async def extend_lease(self, lease: ColdLoadLease, seconds: float) -> ColdLoadLease:
        """The lease with a later end; raises `LeaseLost`."""

    async def release_lease(self, lease: ColdLoadLease) -> None:
        """Ends the lease if it is still the current one."""

    def close(self) -> None:
        """Stops reporting."""
