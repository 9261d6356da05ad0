"""The directory of one host: cold-load leases in this process's memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from weight_brokerd.core.model import ColdLoadLease, LeaseClaim
from weight_brokerd.core.sources import Holder
from weight_brokerd.directory.lease_table import LeaseTable
from weight_brokerd.directory.protocol import DirectoryEvents


class MemoryDirectory:
    """Leases that end with this broker; their holders are its own instances."""

    name = "memory"

    def __init__(
        self,
        *,
        lease_seconds: float,
        first_token: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._table = LeaseTable(first_token)
        self._events: DirectoryEvents | None = None
        self._timer: asyncio.TimerHandle | None = None

    def subscribe(self, events: DirectoryEvents) -> None:
        """Report to `events` from now on. Called once, before anything else."""
        self._events = events

    async def claim(self, weight_set_id: str, claimant: Holder) -> LeaseClaim:
        """The lease goes to the claimant if it is free."""
        claim = self._table.claim(weight_set_id, claimant, now=self._clock(), seconds=self._lease_seconds)
        self._schedule()
        return claim

    async def extend(self, lease: ColdLoadLease, seconds: float) -> ColdLoadLease:
        """The lease with a later end; raises `LeaseLost`."""
        longer = self._table.extend(lease, self._clock() + seconds)
        self._schedule()
        return longer

    async def release(self, lease: ColdLoadLease) -> None:
        """Ends the lease if it is still the current one."""
        if self._table.release(lease) and self._events is not None:
            self._events.lease_ended(lease)

    def close(self) -> None:
        """Stops the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _schedule(self) -> None:
        self.close()
        expiry = self._table.next_expiry()
        if expiry is not None:
            delay = max(0.0, expiry - self._clock())
            self._timer = asyncio.get_running_loop().call_later(delay, self._expire)

    def _expire(self) -> None:
        for lease in self._table.expire(self._clock()):
            if self._events is not None:
                self._events.lease_ended(lease)
        self._schedule()
