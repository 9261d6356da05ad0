"""The control plane: six desks around one core."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from weight_brokerd.attach.stage import StagingConnections
from weight_brokerd.cards.health import count_by_state
from weight_brokerd.control.acquiring import Acquiring
from weight_brokerd.control.checking import Checking
from weight_brokerd.control.draining import Draining
from weight_brokerd.control.executor import Executor
from weight_brokerd.control.leasing import Leasing
from weight_brokerd.control.loop import Loop
from weight_brokerd.control.movements import Movements
from weight_brokerd.control.publishing import Publishing
from weight_brokerd.control.sessions import Sessions
from weight_brokerd.control.watch import WatchHub
from weight_brokerd.core import decisions as decide
from weight_brokerd.core.conduct.quota import Quota
from weight_brokerd.core.coordinator import Coordinator
from weight_brokerd.core.model import ColdLoadLease, DataPlane, Finding
from weight_brokerd.core.publications import Publication
from weight_brokerd.core.transfers import Transfer
from weight_brokerd.directory.protocol import Directory
from weight_brokerd.kinds.host.regions import RegionTable
from weight_brokerd.kinds.registry import Kinds
from weight_brokerd.telemetry import log
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
        descriptors: Quota | None = None,
    ) -> None:
        self.coordinator = coordinator
        self.kinds = kinds
        self.directory = directory
        self.loop = Loop(coordinator, Executor(self))
        self.watch = WatchHub()
        self.ready_at: float | None = None
        """When the broker became ready, by its clock; None before."""
        self._movements = Movements(kinds.route)
        self.sessions = Sessions(self.loop, regions, staging, descriptors)
        self.publishing = Publishing(self.loop, kinds, self._movements, staging)
        self.leasing = Leasing(self.loop, directory)
        self.acquiring = Acquiring(self.loop, kinds, self.publishing, self.leasing, self._movements)
        self.checking = Checking(self.loop, kinds, self.publishing)
        self.draining = Draining(self.loop)
        self._timer: asyncio.TimerHandle | None = None

    @property
    def wall_offset(self) -> float:
        """Time of day minus the broker's clock, now."""
        return time.time() - self.loop.now()

    async def end_movements(self) -> None:
        """End all movements and checks, and what holds or releases memory."""
        await self._movements.close()
        await self.checking.close()
        await self.publishing.close()

    def close(self) -> None:
        """End the Watch calls and stop the timers."""
        self.watch.close()
        self.directory.close()
        self.loop.close()
        if self._timer is not None:
            self._timer.cancel()

    def counts(self) -> Counts:

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
            damage_reports={str(finding): core.damage.judged[finding] for finding in Finding},
            suspect_receivers=core.damage.suspects,
            transfers={str(plane): core.transfers.succeeded[plane] for plane in DataPlane if plane.is_known},
            acquisitions=dict(core.acquisitions.ended),
            log_lines_dropped=log.lines_dropped(),
            datasystem_workers=self._workers(),
        )

    def _workers(self) -> dict[str, int]:
        answering = [worker.is_reachable for worker in self.kinds.workers]
        return {"answering": sum(answering), "silent": len(answering) - sum(answering)}

    def memory_lost(self, kind: str, publication_ids: Iterable[str], why: str) -> None:
        self.publishing.memory_lost(publication_ids, why)

    # Ports (weight_brokerd.control.executor)

    def answer(self, answer: decide.Answer) -> None:
        self.acquiring.answer(answer)

    def hold(self, publication: Publication) -> None:
        self.publishing.hold(publication)

    def release(self, publication: Publication) -> None:
        self.checking.stop(publication)
        self.publishing.release(publication)

    def reserve(self, transfer: Transfer) -> None:
        self.acquiring.reserve(transfer)

    def move(self, transfer: Transfer) -> None:
        self.acquiring.move(transfer)

    def end(self, transfer: Transfer) -> None:
        self.acquiring.end(transfer)

    def claim(self, weight_set_id: str, instance_id: str) -> None:
        self.leasing.claim(weight_set_id, instance_id)

    def give_back(self, lease: ColdLoadLease) -> None:
        self.leasing.give_back(lease)

    def check(self, publication: Publication) -> None:
        self.checking.check(publication)

    def notice(self, notice: decide.Notice) -> None:
        match notice:
            case decide.WeightSetChanged(weight_set_id):
                self.watch.mark_weight_set(weight_set_id)
            case decide.InstanceChanged(instance_id):
                self.watch.mark_instance(instance_id)
            case decide.TransferChanged(transfer):
                self.watch.mark_transfer(transfer)
            case decide.DamageJudged():
                self.checking.judged(notice)

    def failed(self, decision: decide.Decision, error: Exception) -> None:
        match decision:
            case decide.Hold(publication):
                self.publishing.not_held(publication)
            case decide.Reserve(transfer) | decide.Move(transfer):
                self.acquiring.not_reserved(transfer, f"the broker could not hold the source's memory: {error}")
            case decide.ClaimLease(weight_set_id):
                self.leasing.claim_failed(weight_set_id)
            case decide.CheckContent(publication):
                self.checking.not_checked(publication, f"the content could not be read: {error}")

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
