"""Leasing: cold-load leases, between the core and the directory."""

from __future__ import annotations

import asyncio

import structlog

from weight_brokerd.control.loop import Loop
from weight_brokerd.core.model import ColdLoadLease
from weight_brokerd.core.sources import Holder
from weight_brokerd.directory.protocol import Directory
from weight_brokerd.telemetry.audit import audit

FIRST_RETRY_SECONDS = 0.1
LONGEST_RETRY_SECONDS = 5.0

log = structlog.get_logger()


class Leasing:
    """Asks the directory, and takes its events (`weight_brokerd.directory.protocol.DirectoryEvents`)."""

    def __init__(self, loop: Loop, directory: Directory) -> None:
        self._loop = loop
        self._directory = directory
        directory.subscribe(self)

    async def extend(self, instance_id: str, weight_set_id: str, fencing_token: int, seconds: float) -> ColdLoadLease:
        """Extend the lease; raises `LeaseLost`."""
        longer = await self._directory.extend(self._held(instance_id, weight_set_id, fencing_token), seconds)
        audit("extend_lease", instance_id=instance_id, weight_set_id=weight_set_id, seconds=seconds)
        self._loop.carry_out(self._loop.coordinator.lease_extended(longer))
        return longer

    async def give_up(
        self, instance_id: str, weight_set_id: str, fencing_token: int, reason: str, *, unpublishable: bool = False
    ) -> None:
        """Give the lease up; raises `LeaseLost`. `unpublishable`: no instance waits for the weight set any more."""
        lease = self._held(instance_id, weight_set_id, fencing_token)
        audit("give_up_lease", instance_id=instance_id, weight_set_id=weight_set_id, reason=reason)
        if unpublishable:
            why = reason or "its holder gave no reason"
            decisions = self._loop.coordinator.declare_unpublishable(weight_set_id, why, self._loop.now())
            self._loop.carry_out(decisions)
        await self._directory.release(lease)

    def lease_ended(self, lease: ColdLoadLease) -> None:
        """The directory reports that a lease ended."""
        audit("end_lease", instance_id=lease.holder.instance_id, weight_set_id=lease.weight_set_id)
        self._loop.carry_out(self._loop.coordinator.lease_ended(lease, self._loop.now()))

    def claim_failed(self, weight_set_id: str) -> None:
        """The directory did not answer a claim."""
        why = "the directory did not answer the claim for this weight set"
        self._loop.carry_out(self._loop.coordinator.claim_failed(weight_set_id, why, self._loop.now()))

    # Ports

    def claim(self, weight_set_id: str, instance_id: str) -> None:
        self._loop.spawn(self._claim(weight_set_id, instance_id))

    def give_back(self, lease: ColdLoadLease) -> None:
        self._loop.spawn(self._give_back(lease))

    async def _claim(self, weight_set_id: str, instance_id: str) -> None:
        core = self._loop.coordinator
        instance = core.instances.get(instance_id)
        claimant = Holder(core.host_id, instance_id, instance.name if instance is not None else "")
        try:
            claim = await self._directory.claim(weight_set_id, claimant)
        except Exception:  # of any kind: no acquisition may wait for an answer that does not come
            log.exception("directory_claim_failed", weight_set_id=weight_set_id)
            self.claim_failed(weight_set_id)
            return
        if claim.granted:
            audit("grant_lease", instance_id=instance_id, weight_set_id=weight_set_id)
        self._loop.carry_out(core.lease_claimed(weight_set_id, claim, self._loop.now()))

    async def _give_back(self, lease: ColdLoadLease) -> None:
        """Retry until the directory has the lease: all waiters of the weight set wait for that."""
        pause = FIRST_RETRY_SECONDS
        while True:
            try:
                await self._directory.release(lease)
                return
            except Exception:  # a directory that is away comes back, or the lease expires
                log.exception("lease_release_failed", weight_set_id=lease.weight_set_id, retry_seconds=pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_RETRY_SECONDS)

    def _held(self, instance_id: str, weight_set_id: str, fencing_token: int) -> ColdLoadLease:
        core = self._loop.coordinator
        return core.weight_sets.lease_held_by(Holder(core.host_id, instance_id), weight_set_id, fencing_token)
