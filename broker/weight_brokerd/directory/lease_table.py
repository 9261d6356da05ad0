"""Cold-load leases: at most one holder per weight set, each with a fencing token that grows.

The table is the whole truth on one host; a cluster keeps the same rules in its directory.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import replace

from weight_broker.errors import LeaseLost
from weight_brokerd.core.model import ColdLoadLease, LeaseClaim
from weight_brokerd.core.sources import Holder


class LeaseTable:
    """The leases of all weight sets, with one sequence of fencing tokens."""

    def __init__(self, first_token: int = 1) -> None:
        self._tokens = itertools.count(first_token)
        self._leases: dict[str, ColdLoadLease] = {}
        self._expiries: list[tuple[float, int, str]] = []

    def __len__(self) -> int:
        return len(self._leases)

    def get(self, weight_set_id: str) -> ColdLoadLease | None:
        """The current lease, if any."""
        return self._leases.get(weight_set_id)

    def claim(self, weight_set_id: str, claimant: Holder, *, now: float, seconds: float) -> LeaseClaim:
        """Gives the lease to the claimant if it is free."""
        held = self._leases.get(weight_set_id)
        if held is not None:
            return LeaseClaim(held, granted=False)
        lease = ColdLoadLease(weight_set_id, next(self._tokens), claimant, now, now + seconds)
        self._put(lease)
        return LeaseClaim(lease, granted=True)

    def extend(self, lease: ColdLoadLease, expires_at: float) -> ColdLoadLease:
        """The lease with a later end; raises `LeaseLost` if it is not the current one."""
        self._check_current(lease)
        longer = replace(lease, expires_at=max(lease.expires_at, expires_at))
        self._put(longer)
        return longer

    def release(self, lease: ColdLoadLease) -> bool:
        """Ends the lease; False if it had ended already."""
        held = self._leases.get(lease.weight_set_id)
        if held is None or held.fencing_token != lease.fencing_token:
            return False
        del self._leases[lease.weight_set_id]
        return True

    def expire(self, now: float) -> list[ColdLoadLease]:
        """Ends and returns the leases whose time is over."""
        ended = []
        while self._expiries and self._expiries[0][0] <= now:
            _, token, weight_set_id = heapq.heappop(self._expiries)
            lease = self._leases.get(weight_set_id)
            if lease is not None and lease.fencing_token == token and lease.expires_at <= now:
                del self._leases[weight_set_id]
                ended.append(lease)
        return ended

    def next_expiry(self) -> float | None:
        """When `expire` is due next; possibly early."""
        return self._expiries[0][0] if self._expiries else None

    def _put(self, lease: ColdLoadLease) -> None:
        self._leases[lease.weight_set_id] = lease
        heapq.heappush(self._expiries, (lease.expires_at, lease.fencing_token, lease.weight_set_id))

    def _check_current(self, lease: ColdLoadLease) -> None:
        held = self._leases.get(lease.weight_set_id)
        if held is None or held.fencing_token != lease.fencing_token:
            raise LeaseLost(
                f"the cold-load lease {lease.fencing_token} of weight set {lease.weight_set_id} has ended",
                metadata={"weight_set_id": lease.weight_set_id, "fencing_token": str(lease.fencing_token)},
            )
