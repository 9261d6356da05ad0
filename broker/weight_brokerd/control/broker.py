"""Drives the coordinator: feeds it events and the time, and carries its decisions out.

Everything runs on one asyncio loop, so an event and its decisions are one step that nothing interleaves with, except
where the directory is asked, which may take a round trip.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import socket
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import replace

import structlog

from weight_broker.errors import NotAttached, Reason, from_reason
from weight_brokerd.attach.server import PeerCredentials, Session
from weight_brokerd.attach.stage import Stages
from weight_brokerd.cards.health import count_by_state
from weight_brokerd.control.mailboxes import Granted, Mailbox, Mailboxes, Moved
from weight_brokerd.control.movements import Movements
from weight_brokerd.control.residency import Residency
from weight_brokerd.control.watch import WatchHub
from weight_brokerd.core import decisions as decide
from weight_brokerd.core.coordinator import Coordinator
from weight_brokerd.core.model import (
    Acquisition,
    Arrival,
    ColdLoadLease,
    FailureCause,
    Instance,
    Offer,
    Publication,
    PublicationState,
    Transfer,
    TransferPath,
)
from weight_brokerd.dataplane.plane import NOWHERE, MoveFailed, Place
from weight_brokerd.directory.protocol import Directory
from weight_brokerd.kinds.host.regions import RegionTable
from weight_brokerd.kinds.published import PublishedMemory
from weight_brokerd.kinds.registry import Kinds
from weight_brokerd.telemetry.audit import audit
from weight_brokerd.telemetry.metrics import Counts

log = structlog.get_logger()


class Driver:
    """The broker, without its sockets."""

    def __init__(
        self,
        *,
        coordinator: Coordinator,
        regions: RegionTable,
        directory: Directory,
        kinds: Kinds,
        stages: Stages,
    ) -> None:
        """`regions`: what instances hand over on the attach socket; `stages`: the instances that copy by themselves.
        Both know the kinds that need them."""
        self.coordinator = coordinator
        self.regions = regions
        self.directory = directory
        self.kinds = kinds
        self._stages = stages
        self._movements = Movements(kinds.route, self)
        self._residency = Residency(kinds, self._movements.left, self._held, self._refused)
        self.watch = WatchHub()
        self.on_drain: Callable[[], None] = lambda: None
        """Called when a drain begins, whoever wants it."""
        self.clock = time.monotonic
        self.wall_offset = time.time() - time.monotonic()
        """Add it to a time of the clock for the time of day."""
        self.ready_at: float | None = None
        """When the broker became ready; None before."""
        self._instance_numbers = itertools.count(1)
        self._sessions: dict[bytes, Session] = {}
        self._tokens: dict[str, bytes] = {}
        self._mailboxes = Mailboxes(
            self._movements, lambda lease: self._spawn(self.directory.release_lease(lease)), self._spawn
        )
        self._memory: dict[str, PublishedMemory] = {}
        self._destinations: dict[str, Place] = {}
        """Where the broker is to move the weights, by acquisition."""
        self._gone: dict[str, asyncio.Event] = {}
        self._idle = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        directory.subscribe(self)

    # Instances (weight_brokerd.attach.server.Attendance)

    def attach(self, peer: PeerCredentials, name: str, client_version: str) -> Session:
        """A process attached; its token is its identity from now on."""
        instance_id = f"instance-{next(self._instance_numbers)}"
        instance = Instance(
            instance_id, name or f"pid-{peer.pid}", peer.pid, peer.uid, peer.gid, attached_at=self.clock()
        )
        decisions = self.coordinator.attach(instance)
        session = Session(instance_id=instance_id, token=secrets.token_bytes(32), peer=peer)
        self._sessions[session.token] = session
        self._tokens[instance_id] = session.token
        audit("attach", instance_id=instance_id, name=name, pid=peer.pid, uid=peer.uid, client_version=client_version)
        self._carry_out(decisions)
        return session

    def disconnected(self, instance_id: str) -> None:
        """The attach socket closed; the process may live on."""
        self._carry_out(self.coordinator.disconnect(instance_id))

    def departed(self, instance_id: str, reason: str) -> None:
        """The process died or said goodbye."""
        token = self._tokens.pop(instance_id, None)
        if token is None:
            return
        del self._sessions[token]
        audit("depart", instance_id=instance_id, reason=reason)
        self._stages.drop(instance_id)
        self._carry_out(self.coordinator.depart(instance_id, self.clock()))
        self.regions.drop_instance(instance_id)

    def offer_region(self, instance_id: str, region_id: str, size_bytes: int, fd: int) -> None:
        """An instance hands a memfd over; `fd` is taken in every case."""
        self.regions.offer(instance_id, region_id, size_bytes, fd)
        audit("offer_region", instance_id=instance_id, region_id=region_id, size_bytes=size_bytes)

    def withdraw_region(self, instance_id: str, region_id: str) -> None:
        """An instance takes a region back."""
        self.regions.withdraw(instance_id, region_id)
        audit("withdraw_region", instance_id=instance_id, region_id=region_id)

    def claim_region(self, instance_id: str, transfer_id: str, region_index: int) -> int:
        """The file descriptor of a region of a running transfer's source, to be passed to the receiver."""
        transfer = self.coordinator.transfers.running.get(transfer_id)
        if transfer is None or transfer.receiver_instance_id != instance_id:
            raise from_reason(
                Reason.TRANSFER_NOT_FOUND,
                f"no transfer {transfer_id!r} runs for this instance",
                metadata={"transfer_id": transfer_id},
            )
        return self.regions.descriptor(transfer_id, region_index)

    def stage_owner(self, token: bytes, peer: PeerCredentials) -> str:
        """The instance that serves on a stage connection; raises `NotAttached`."""
        session = self.session(token)
        if (session.peer.pid, session.peer.uid) != (peer.pid, peer.uid):
            raise NotAttached("the token is another process's; each process attaches for itself")
        return session.instance_id

    def stage_connected(self, instance_id: str, connection: socket.socket) -> None:
        """Takes the instance's stage connection over."""
        if instance_id not in self._tokens:
            connection.close()
            return
        audit("serve_stage", instance_id=instance_id)
        self._stages.connected(instance_id, connection)

    def session(self, token: bytes) -> Session:
        """The session of a token; raises `NotAttached`."""
        session = self._sessions.get(token)
        if session is None:
            raise NotAttached("this call needs the token of an attached process; attach to attach.sock first")
        return session

    # Publications

    async def publish(self, offer: Offer, memory: PublishedMemory) -> Publication:
        """Offers a weight set; it is resident when this returns. Raises `PublishRefused` and others."""
        publication, decisions = self.coordinator.publish(offer, self.clock())
        if decisions:
            self._memory[publication.publication_id] = memory
            audit(
                "publish",
                instance_id=offer.instance_id,
                publication_id=publication.publication_id,
                weight_set_id=publication.weight_set_id,
                generation=publication.generation,
                size_bytes=publication.layout.content_bytes,
            )
            self._carry_out(decisions)
        await self._residency.held(publication.publication_id)
        return publication

    async def retract(self, instance_id: str, publication_id: str) -> Publication:
        """Withdraws a publication and waits until nobody reads it, and device memory is not mapped any more."""
        residency = self._residency
        if residency.is_releasing(instance_id, publication_id):
            publication = residency.publication(publication_id)
            await residency.released(publication_id)
            return publication
        publication, decisions = self.coordinator.retract(instance_id, publication_id, self.clock())
        audit("retract", instance_id=instance_id, publication_id=publication_id)
        gone = self._gone.setdefault(publication_id, asyncio.Event())
        self._carry_out(decisions)
        await gone.wait()
        await residency.released(publication_id)
        return publication

    def evict(self, instance_id: str, publication_id: str) -> Publication:
        """Takes a publication out of service without waiting for readers; `instance_id` is the administrator's."""
        publication, decisions = self.coordinator.evict(publication_id, self.clock())
        audit("evict", instance_id=instance_id, publication_id=publication_id)
        self._carry_out(decisions)
        return publication

    def quarantine(self, instance_id: str, publication_id: str, reason: str) -> Publication:
        """Sets a publication aside; `instance_id` is the administrator's."""
        publication, decisions = self.coordinator.quarantine(publication_id, reason, self.clock())
        audit("quarantine", instance_id=instance_id, publication_id=publication_id, reason=reason)
        self._carry_out(decisions)
        return publication

    # Acquisitions

    def begin_acquisition(self, acquisition: Acquisition, destination: Place = NOWHERE) -> Mailbox:
        """Starts an acquisition; what becomes of it arrives in the queue. `destination` is where the broker is to move
        the bytes, if it does."""
        decisions = self.coordinator.acquire(acquisition, self.clock())
        self._destinations[acquisition.acquisition_id] = destination
        mailbox = self._mailboxes.open(acquisition.acquisition_id)
        self._carry_out(decisions)
        return mailbox

    def lease_heard(self, acquisition_id: str) -> None:
        """The answer of a call that is to load from disk was sent."""
        self._mailboxes.lease_heard(acquisition_id)

    def end_acquisition(self, acquisition_id: str) -> None:
        """The call is over, however it ended; its reader slot is free, and so is a lease that it never heard of."""
        self._mailboxes.close(acquisition_id)
        self._carry_out(self.coordinator.abandon(acquisition_id, self.clock()))
        self._destinations.pop(acquisition_id, None)
        self._spawn(self._movements.forget(acquisition_id))

    def transfer_succeeded(self, instance_id: str, transfer_id: str, arrival: Arrival) -> None:
        """The receiver has every byte."""
        self._carry_out(self.coordinator.transfer_succeeded(transfer_id, instance_id, arrival, self.clock()))

    def transfer_failed(self, instance_id: str, transfer_id: str, cause: FailureCause, detail: str) -> None:
        """The receiver has not."""
        decisions = self.coordinator.transfer_failed(transfer_id, instance_id, cause, detail, self.clock())
        audit("transfer_failed", instance_id=instance_id, transfer_id=transfer_id, cause=str(cause), detail=detail)
        self._carry_out(decisions)

    async def settled(self, acquisition_id: str) -> None:
        """Returns when the broker does not write to the acquisition's memory any more."""
        await self._movements.settled(acquisition_id)

    # What the broker moves (weight_brokerd.control.movements.MovementEvents)

    def moved(self, transfer: Transfer, seconds: Mapping[str, float]) -> None:
        """Every byte is where it belongs."""
        decisions = self.coordinator.transfer_moved(transfer.transfer_id, self.clock())
        if transfer.is_moved:
            self._mailboxes.post(transfer.acquisition_id, Moved(transfer, seconds))
        self._carry_out(decisions)

    def not_moved(self, transfer: Transfer, failure: MoveFailed) -> None:
        """The movement has failed."""
        if transfer.transfer_id not in self.coordinator.transfers.running:
            return
        audit("transfer_failed", transfer_id=transfer.transfer_id, cause=str(failure.cause), detail=str(failure))
        self._carry_out(
            self.coordinator.transfer_failed(
                transfer.transfer_id,
                transfer.receiver_instance_id,
                failure.cause,
                str(failure),
                self.clock(),
                touched=failure.touched,
                quiesced=failure.quiesced,
                needs_staging=failure.needs_staging,
            )
        )

    def staged(self, transfer: Transfer) -> None:
        """The receiver copies from now on: the same transfer is granted again, with the path that it takes."""
        destination = self._destinations.get(transfer.acquisition_id)
        if destination is None or transfer.transfer_id not in self.coordinator.transfers.running:
            return
        self._destinations[transfer.acquisition_id] = destination.as_staged
        transfer.path = self.coordinator.acquisitions[transfer.acquisition_id].path = TransferPath.STAGED
        self._carry_out([decide.TransferChanged(transfer)])
        self._mailboxes.post(transfer.acquisition_id, self._granted(transfer))

    # Cold-load leases

    async def extend_lease(
        self, instance_id: str, weight_set_id: str, fencing_token: int, seconds: float
    ) -> ColdLoadLease:
        """Extends the lease; raises `LeaseLost`."""
        lease = self.coordinator.lease_held_by(instance_id, weight_set_id, fencing_token)
        longer = await self.directory.extend_lease(lease, seconds)
        audit("extend_lease", instance_id=instance_id, weight_set_id=weight_set_id, seconds=seconds)
        self._carry_out(self.coordinator.lease_extended(longer))
        return longer

    async def give_up_lease(
        self, instance_id: str, weight_set_id: str, fencing_token: int, reason: str, *, unpublishable: bool = False
    ) -> None:
        """Gives the lease up; raises `LeaseLost`. If it is `unpublishable`, nobody is to wait for the weight set."""
        lease = self.coordinator.lease_held_by(instance_id, weight_set_id, fencing_token)
        audit("give_up_lease", instance_id=instance_id, weight_set_id=weight_set_id, reason=reason)
        if unpublishable:
            why = reason or "its holder did not say why"
            self._carry_out(self.coordinator.declare_unpublishable(weight_set_id, why, self.clock()))
        await self.directory.release_lease(lease)

    def lease_free(self, lease: ColdLoadLease) -> None:
        """The directory reports that a lease ended (weight_brokerd.directory.protocol.DirectoryEvents)."""
        audit("end_lease", instance_id=lease.instance_id, weight_set_id=lease.weight_set_id)
        self._carry_out(self.coordinator.lease_free(lease, self.clock()))

    # Drain

    def begin_drain(self, instance_id: str = "") -> None:
        """Refuses new work from now on; `instance_id` is the administrator's, empty if the broker stops."""
        if not self.coordinator.draining:
            audit("drain", instance_id=instance_id)
            self._carry_out(self.coordinator.drain())
            self.on_drain()

    async def drain(self, timeout_seconds: float, instance_id: str = "") -> bool:
        """Refuses new work and waits for running transfers; False if some still run after the timeout."""
        self.begin_drain(instance_id)
        try:
            async with asyncio.timeout(timeout_seconds):
                while self.coordinator.transfers.running:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def cut_off(self) -> None:
        """Ends the transfers that still run, so that their calls end with an answer."""
        audit("cut_off", running_transfers=len(self.coordinator.transfers.running))
        self._carry_out(self.coordinator.cut_off(self.clock()))

    async def end_movements(self) -> None:
        """Ends what the broker moves, and lets the cards go."""
        await self._movements.close()
        await self._residency.close()

    def close(self) -> None:
        """Ends the Watch calls and stops the timers."""
        self.watch.close()
        self.directory.close()
        if self._timer is not None:
            self._timer.cancel()

    def counts(self) -> Counts:
        """How much there is of everything."""
        core, kinds = self.coordinator, self.kinds
        return Counts(
            instances=len(core.instances),
            publications=len(core.registry),
            regions=kinds.region_count,
            region_bytes=kinds.region_bytes,
            running_transfers=len(core.transfers.running),
            waiting_acquisitions=sum(1 for one in core.acquisitions.values() if not one.transfer_id),
            cold_load_leases=sum(1 for record in core.weight_sets if record.lease is not None),
            cards=count_by_state([card for _, card in kinds.health]),
        )

    # Decisions

    def _carry_out(self, decisions: Iterable[decide.Decision]) -> None:
        """Carries all of them out, whatever becomes of one."""
        for decision in decisions:
            try:
                self._carry_out_one(decision)
            except Exception:  # the decisions after it concern others, and nobody would make them again
                log.exception("defect", decision=type(decision).__name__)
                if isinstance(decision, decide.Grant):
                    self._try_another_source(decision.transfer)
        self._schedule()

    def _carry_out_one(self, decision: decide.Decision) -> None:
        match decision:
            case decide.Grant(acquisition_id, transfer):
                self._mailboxes.post(acquisition_id, self._granted(transfer))
                if transfer.is_brokers:
                    self._move(transfer)
            case decide.TellColdLoad() | decide.Fail():
                self._mailboxes.post_end(decision)
            case decide.Wait(acquisition_id) | decide.Complete(acquisition_id):
                self._mailboxes.post(acquisition_id, decision)
            case decide.Map(publication):
                self._residency.hold(publication, self._memory[publication.publication_id].place)
            case decide.Unmap(publication):
                self._unmap(publication)
            case decide.EndTransfer(transfer):
                self._movements.stop(transfer)
                self.kinds.of(transfer.publication.device_kind).end(transfer)
                if not self.coordinator.transfers.running:
                    self._idle.set()
            case decide.ClaimLease(weight_set_id, instance_id):
                self._spawn(self._claim_lease(weight_set_id, instance_id))
            case decide.ReleaseLease(lease):
                self._spawn(self.directory.release_lease(lease))
            case decide.WeightSetChanged(weight_set_id):
                self.watch.mark_weight_set(weight_set_id)
            case decide.InstanceChanged(instance_id):
                self.watch.mark_instance(instance_id)
            case decide.TransferChanged(transfer):
                self.watch.mark_transfer(transfer)

    def _move(self, transfer: Transfer) -> None:
        acquisition = self.coordinator.acquisitions[transfer.acquisition_id]
        source = self._memory[transfer.publication.publication_id].place
        destination = self._destinations[transfer.acquisition_id]
        timeout = min(acquisition.deadline - self.clock(), self.kinds.transfer_seconds)
        self._movements.start(transfer, source, destination, timeout)

    def _granted(self, transfer: Transfer) -> Granted:
        publication = transfer.publication
        regions = self.kinds.of(publication.device_kind).grant(transfer)
        # Serialized messages that follow each other are one message.
        return Granted(transfer, self._memory[publication.publication_id].digests + regions)

    def _try_another_source(self, transfer: Transfer) -> None:
        """The acquisition was granted what it cannot have; it is not to wait for it."""
        if transfer.transfer_id in self.coordinator.transfers.running:
            self.transfer_failed(
                transfer.receiver_instance_id,
                transfer.transfer_id,
                FailureCause.SOURCE_UNREACHABLE,
                "the broker could not hold the source's memory",
            )

    def _held(self, publication: Publication, place: Place) -> None:
        publication_id = publication.publication_id
        memory = self._memory.get(publication_id)
        if memory is not None:
            self._memory[publication_id] = replace(memory, place=place)
            publication.is_staged = place.is_staged
        self._carry_out(self.coordinator.mapped(publication, self.clock()))
        if place.is_staged and not self._stages.has(publication.instance_id):
            self.stage_lost(publication.instance_id, "its stage connection has ended")

    def _refused(self, publication: Publication) -> None:
        self._carry_out(self.coordinator.mapping_failed(publication, self.clock()))

    def memory_lost(self, kind: str, publication_ids: Iterable[str], why: str) -> None:
        """Published memory became unreachable (weight_brokerd.kinds.kind.KindEvents)."""
        for publication_id in publication_ids:
            audit("lose_publication", publication_id=publication_id, why=why)
            self._carry_out(self.coordinator.lose(publication_id, why, self.clock()))

    def stage_lost(self, instance_id: str, reason: str) -> None:
        """The stage connection of an instance has ended: it copies for no other any more."""
        why = f"its instance copies nothing for others any more: {reason}"
        for publication in self.coordinator.registry.of_instance(instance_id):
            if publication.is_staged and publication.state is not PublicationState.GONE:
                audit("lose_publication", publication_id=publication.publication_id, why=why)
                self._carry_out(self.coordinator.lose(publication.publication_id, why, self.clock()))

    def _unmap(self, publication: Publication) -> None:
        self._residency.release(publication)
        self._memory.pop(publication.publication_id, None)
        gone = self._gone.pop(publication.publication_id, None)
        if gone is not None:
            gone.set()

    async def _claim_lease(self, weight_set_id: str, instance_id: str) -> None:
        instance = self.coordinator.instances.get(instance_id)
        try:
            claim = await self.directory.claim_lease(
                weight_set_id, instance_id=instance_id, instance_name=instance.name if instance is not None else ""
            )
        except Exception:  # whatever it is, nobody may wait for an answer that does not come
            log.exception("directory_claim_failed", weight_set_id=weight_set_id)
            why = "the directory did not say who loads this weight set"
            self._carry_out(self.coordinator.claim_failed(weight_set_id, why, self.clock()))
            return
        if claim.granted:
            audit("grant_lease", instance_id=instance_id, weight_set_id=weight_set_id)
        self._carry_out(self.coordinator.lease_claimed(weight_set_id, claim, self.clock()))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("directory_call_failed", exc_info=error)

    def _schedule(self) -> None:
        deadline = self.coordinator.next_deadline()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if deadline is not None:
            delay = max(0.0, deadline - self.clock())
            self._timer = asyncio.get_running_loop().call_later(delay, self._advance)

    def _advance(self) -> None:
        self._carry_out(self.coordinator.advance(self.clock()))
