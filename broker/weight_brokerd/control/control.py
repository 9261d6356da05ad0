"""The control plane: five desks around one core."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from weight_brokerd.attach.stage import StagingConnections
from weight_brokerd.cards.health import count_by_state
from weight_brokerd.control.acquiring import Acquiring
from weight_brokerd.control.draining import Draining
from weight_brokerd.control.executor import Executor
from weight_brokerd.control.leasing import Leasing
from weight_brokerd.control.loop import Loop
from weight_brokerd.control.movements import Movements
from weight_brokerd.control.publishing import Publishing
from weight_brokerd.control.sessions import Sessions
from weight_brokerd.control.watch import WatchHub
from weight_brokerd.core import decisions as decide
from weight_brokerd.core.coordinator import Coordinator
from weight_brokerd.core.model import ColdLoadLease
from weight_brokerd.core.publications import Publication
from weight_brokerd.core.transfers import Transfer
from weight_brokerd.directory.protocol import Directory
from weight_brokerd.kinds.host.regions import RegionTable
from weight_brokerd.kinds.registry import Kinds
from weight_brokerd.telemetry.counts import Counts


class Control:
    """The broker, without its sockets. It is the executor's `Ports`: every decision goes to its desk."""

    def __init__(
        self,
        *,
        coordinator: Coordinator,
        kinds: Kinds,
        directory: Directory,
        regions: RegionTable,
        staging: StagingConnections,
    ) -> None:
        self.coordinator = coordinator
        self.kinds = kinds
        self.directory = directory
        self.loop = Loop(coordinator, Executor(self))
        self.watch = WatchHub()
        self.ready_at: float | None = None
        """When the broker became ready, by its clock; None before."""
        self._movements = Movements(kinds.route)
        self.sessions = Sessions(self.loop, regions, staging)
        self.publishing = Publishing(self.loop, kinds, self._movements, staging)
        self.leasing = Leasing(self.loop, directory)
        self.acquiring = Acquiring(self.loop, kinds, self.publishing, self.leasing, self._movements)
        self.draining = Draining(self.loop)
        self._timer: asyncio.TimerHandle | None = None

    @property
    def wall_offset(self) -> float:
        """Add it to a time of the broker's clock for the time of day, as it is told now."""
        return time.time() - self.loop.now()

    async def end_movements(self) -> None:
        """End what the broker moves, holds and releases."""
        await self._movements.close()
        await self.publishing.close()

    def close(self) -> None:
        """End the Watch calls and stop the timers."""
        self.watch.close()
        self.directory.close()
        self.loop.close()
        if self._timer is not None:
            self._timer.cancel()

    def counts(self) -> Counts:
        """How much there is of everything."""
        core = self.coordinator
        return Counts(
            instances=len(core.instances),
            publications=len(core.publications),
            regions=self.kinds.region_count,
            region_bytes=self.kinds.region_bytes,
            running_transfers=len(core.transfers.running),
            waiting_acquisitions=len(core.acquisitions.waiting),
            cold_load_leases=sum(1 for record in core.weight_sets if record.lease is not None),
            cards=count_by_state([card for _, card in self.kinds.health]),
        )

    def memory_lost(self, kind: str, publication_ids: Iterable[str], why: str) -> None:
        """Published memory became unreachable (`weight_brokerd.kinds.kind.KindEvents`)."""
        self.publishing.memory_lost(publication_ids, why)

    # Ports (weight_brokerd.control.executor)

    def answer(self, answer: decide.Answer) -> None:
        """Tell the caller of the acquisition."""
        self.acquiring.answer(answer)

    def hold(self, publication: Publication) -> None:
        """Make the publication's memory readable."""
        self.publishing.hold(publication)

    def release(self, publication: Publication) -> None:
        """Let go of the publication's memory."""
        self.publishing.release(publication)

    def reserve(self, transfer: Transfer) -> None:
        """Keep the source readable for the transfer."""
        self.acquiring.reserve(transfer)

    def move(self, transfer: Transfer) -> None:
        """Move the transfer's bytes."""
        self.acquiring.move(transfer)

    def end(self, transfer: Transfer) -> None:
        """Let go of what the transfer held."""
        self.acquiring.end(transfer)

    def claim(self, weight_set_id: str, instance_id: str) -> None:
        """Ask the directory for the lease."""
        self.leasing.claim(weight_set_id, instance_id)

    def give_back(self, lease: ColdLoadLease) -> None:
        """Give the lease back to the directory."""
        self.leasing.give_back(lease)

    def notice(self, notice: decide.Notice) -> None:
        """Tell those who watch."""
        match notice:
            case decide.WeightSetChanged(weight_set_id):
                self.watch.mark_weight_set(weight_set_id)
            case decide.InstanceChanged(instance_id):
                self.watch.mark_instance(instance_id)
            case decide.TransferChanged(transfer):
                self.watch.mark_transfer(transfer)

    def failed(self, decision: decide.Decision, error: Exception) -> None:
        """Feed back that an action could not even be begun."""
        match decision:
            case decide.Hold(publication):
                self.publishing.not_held(publication)
            case decide.Reserve(transfer) | decide.Move(transfer):
                self.acquiring.not_reserved(transfer, f"the broker could not hold the source's memory: {error}")
            case decide.ClaimLease(weight_set_id):
                self.leasing.claim_failed(weight_set_id)

    def settled(self) -> None:
        """Set the timer for the next deadline."""
        self.draining.settled()
        deadline = self.coordinator.next_deadline()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if deadline is not None:
            delay = max(0.0, deadline - self.loop.now())
            self._timer = asyncio.get_running_loop().call_later(delay, self._advance)

    def _advance(self) -> None:
        self.loop.carry_out(self.coordinator.advance(self.loop.now()))
