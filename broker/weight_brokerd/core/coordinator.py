"""Turns events into decisions: which acquisition reads, from which source, which loads from disk, which waits.

Every public method is one event: it changes the state, then serves every weight set that the event touched once, and
returns the decisions. Nothing here blocks, reads a clock or touches a device, so that any interleaving of events can be
replayed.
"""

from __future__ import annotations

from collections.abc import Hashable

from weight_broker.errors import BrokerUnavailable, InvalidArgument, NotAttached
from weight_brokerd.core import answers
from weight_brokerd.core.acquisitions import Acquisitions
from weight_brokerd.core.answers import WAITS, Explanation, Question, Situation, Verdict, Wish, judge
from weight_brokerd.core.conduct.layouts import LayoutRoom
from weight_brokerd.core.conduct.quota import instance_slots
from weight_brokerd.core.decisions import (
    ClaimLease,
    Decisions,
    Grant,
    Hold,
    InstanceChanged,
    Move,
    ReleaseLease,
    TransferChanged,
    WeightSetChanged,
)
from weight_brokerd.core.endings import Endings
from weight_brokerd.core.load_groups import LoadGroups
from weight_brokerd.core.model import (
    Acquisition,
    Arrival,
    ColdLoadLease,
    DataPlane,
    FailureCause,
    Finding,
    Instance,
    InstanceState,
    LeaseClaim,
    Limits,
    Remedy,
    TransferPath,
)
from weight_brokerd.core.publications import Offer, Publication, Publications, PublicationState
from weight_brokerd.core.selection import Receiver, Selection, select
from weight_brokerd.core.sources import Holder
from weight_brokerd.core.transfers import Transfer, TransferLog, TransferState
from weight_brokerd.core.weight_sets import WeightSetIndex, WeightSetRecord


class Coordinator:
    """What the broker knows and decides about the instances, publications and acquisitions of this host."""

    def __init__(self, *, host_id: str, limits: Limits, first_generation: int = 1) -> None:
        self.host_id = host_id
        self.limits = limits
        self.draining = False
        self.instances: dict[str, Instance] = {}
        self._slots = instance_slots(limits)
        self.layout_room = LayoutRoom(limits)
        self.publications = Publications(host_id, limits, self.layout_room, first_generation=first_generation)
        self.transfers = TransferLog(host_id, limits.transfers_remembered)
        self.weight_sets = WeightSetIndex(self.publications)
        self.acquisitions = Acquisitions(self.publications, self.weight_sets, self.transfers, self.layout_room)
        self.groups = LoadGroups(host_id, self.acquisitions, self.publications, self.weight_sets)
        self._endings = Endings(self.publications, self.transfers, self.acquisitions, self.instances)
        self.damage = self._endings.damage

    # Instances

    def attach(self, instance: Instance) -> Decisions:
        """A process attached. Allowed during a drain: administrators attach too."""
        self._slots.take(instance.process)
        self.instances[instance.instance_id] = instance
        return [InstanceChanged(instance.instance_id)]

    def disconnect(self, instance_id: str) -> Decisions:
        """The attach socket closed, but the process lives, and so does what it published."""
        instance = self.instances.get(instance_id)
        if instance is None:
            return []
        instance.state = InstanceState.DISCONNECTED
        return [InstanceChanged(instance_id)]

    def depart(self, instance_id: str, now: float) -> Decisions:
        """The process died or said goodbye: its acquisitions end, then what it published, then its leases."""
        instance = self.instances.pop(instance_id, None)
        if instance is None:
            return []
        decisions: Decisions = []
        published = self.publications.of_instance(instance_id)
        for acquisition in self.acquisitions:
            if acquisition.instance_id == instance_id:
                decisions += self._endings.drop(acquisition, now)
        for publication in published:
            if publication.state is not PublicationState.GONE:  # it may have waited for a reader that was dropped
                decisions += self._endings.end_publication(publication, "its instance ended", now)
        decisions += self._settle(now)
        self._slots.give_back(instance.process)
        self.damage.forget_instance(instance)
        departed = Holder(self.host_id, instance_id)
        leases = [record.lease for record in self.weight_sets if record.lease is not None]
        decisions += [ReleaseLease(lease) for lease in leases if lease.holder == departed]
        return [*decisions, InstanceChanged(instance_id)]

    # Publications

    def publish(self, offer: Offer, now: float) -> tuple[Publication, Decisions]:
        """An instance offers a weight set; it is readable once `held` says so."""
        self._check_not_draining()
        earlier = self.publications.of_request(offer)
        if earlier is not None:
            return earlier, []
        publication = self.publications.add(offer, self._attached(offer.instance_id), now=now)
        self.weight_sets.record(offer.key)
        return publication, [Hold(publication)]

    def held(self, publication: Publication, now: float, *, is_staged: bool = False) -> Decisions:
        """The publication's memory is readable: it is resident, and a lease that it fulfils ends. `is_staged`: its
        instance copies it for each transfer."""
        if publication.state is not PublicationState.REGISTERING:
            return []
        publication.is_staged = is_staged
        self.publications.move(publication, PublicationState.RESIDENT)
        self.weight_sets.note_unpublishable(publication.key, "")
        decisions: Decisions = [
            WeightSetChanged(publication.weight_set_id),
            InstanceChanged(publication.instance_id),
        ]
        lease = self.weight_sets.record(publication.key).lease
        fulfilled = (publication.holder, publication.fencing_token)
        if lease is not None and (lease.holder, lease.fencing_token) == fulfilled:
            decisions.append(ReleaseLease(lease))
        return decisions + self._settle(now, publication.weight_set_id)

    def not_held(self, publication: Publication, now: float) -> Decisions:
        """The publication's memory cannot be made readable: the publication ends without having been resident."""
        if publication.state is not PublicationState.REGISTERING:
            return []
        return self._endings.end_publication(publication) + self._settle(now)

    def retract(self, instance_id: str, publication_id: str, now: float) -> tuple[Publication, Decisions]:
        """The instance wants its memory back: no new readers. The publication is gone after the last reader."""
        publication = self.publications.held_by(Holder(self.host_id, instance_id), publication_id)
        if publication.state is PublicationState.REGISTERING or not publication.readers:
            return publication, self._endings.end_publication(publication) + self._settle(now)
        if publication.state is not PublicationState.RETRACTING:
            self.publications.move(publication, PublicationState.RETRACTING)
        changed = WeightSetChanged(publication.weight_set_id)
        return publication, [changed, *self._settle(now, publication.weight_set_id)]

    def evict(self, publication_id: str, now: float) -> tuple[Publication, Decisions]:
        """An administrator takes a publication out of service, without waiting for readers."""
        publication = self.publications.get(publication_id)
        return publication, self._endings.end_publication(publication, "it was evicted", now) + self._settle(now)

    def lose(self, publication_id: str, why: str, now: float) -> Decisions:
        """The memory of a publication cannot be reached any more."""
        publication = self.publications.find(publication_id)
        if publication is None:
            return []
        return self._endings.end_publication(publication, why, now) + self._settle(now)

    def quarantine(self, publication_id: str, reason: str, now: float) -> tuple[Publication, Decisions]:
        """The publication is never read again, but stays in listings."""
        publication = self.publications.get(publication_id)
        return publication, self._endings.quarantine(publication, reason) + self._settle(now)

    def checked(self, publication: Publication, finding: Finding, detail: str, now: float) -> Decisions:
        """The check of a publication's content has ended; `detail` is the reason of a quarantine."""
        if publication.state is PublicationState.GONE:
            return []
        return self._endings.judge_damage(publication, finding, detail, now) + self._settle(now)

    # Acquisitions

    def acquire(self, acquisition: Acquisition, now: float) -> Decisions:
        """An instance asks for a weight set."""
        self._check_not_draining()
        process = self._attached(acquisition.instance_id).process
        acquisition.failed_sources |= self.damage.apart_from(process)
        self.acquisitions.begin(acquisition, process)
        refused = self.groups.join(acquisition, acquisition.rank) if acquisition.rank is not None else None
        if refused is not None:
            return self.acquisitions.fail(acquisition, refused) + self._settle(now)
        self._endings.touch_newcomer(acquisition)
        return [*self._settle(now), WeightSetChanged(acquisition.key.id)]

    def reserved(self, transfer_id: str, data_plane: DataPlane) -> Decisions:
        """The source stays readable for the transfer, and `data_plane` moves the bytes: grant it, and begin to move
        bytes that the broker moves."""
        transfer = self.transfers.running.get(transfer_id)
        if transfer is None:
            return []
        transfer.data_plane = data_plane
        moves: Decisions = [Move(transfer)] if transfer.broker_copies else []
        return [Grant(transfer.acquisition_id, transfer), *moves]

    def not_reserved(self, transfer_id: str, why: str, now: float) -> Decisions:
        """The source cannot be kept readable for the transfer: the acquisition tries the next source."""
        transfer = self.transfers.running.get(transfer_id)
        if transfer is None:
            return []
        return self._endings.try_next(transfer, FailureCause.SOURCE_UNREACHABLE, why, now) + self._settle(now)

    def routed(self, transfer_id: str, data_plane: DataPlane) -> Decisions:
        """The transfer takes this data plane now. If the receiver was told of another one, the transfer is granted
        again."""
        transfer = self.transfers.running.get(transfer_id)
        if transfer is None or transfer.data_plane is data_plane:
            return []
        transfer.data_plane = data_plane
        return [Grant(transfer.acquisition_id, transfer), TransferChanged(transfer)]

    def staged(self, transfer_id: str) -> Decisions:
        """The receiver's memory cannot be mapped, so its owner copies it from now on: the transfer is granted again,
        with its new path."""
        transfer = self.transfers.running.get(transfer_id)
        if transfer is None:
            return []
        transfer.path = self.acquisitions[transfer.acquisition_id].path = TransferPath.STAGED
        return [Grant(transfer.acquisition_id, transfer), TransferChanged(transfer)]

    def transfer_succeeded(self, transfer_id: str, instance_id: str, arrival: Arrival, now: float) -> Decisions:
        """Every byte of the transfer arrived and was verified."""
        transfer, acquisition = self._of_receiver(transfer_id, instance_id)
        if transfer.broker_copies and not transfer.is_moved:
            raise InvalidArgument("outcome", "succeeded", "failed: the broker has not moved every byte yet")
        transfer.publication.served_count += 1
        decisions = self._endings.end_transfer(transfer, TransferState.SUCCEEDED, "", now)
        if acquisition.rank is not None:
            decisions += self.groups.arrived(acquisition, transfer, arrival)
        else:
            decisions += self.acquisitions.complete(acquisition, transfer, arrival)
        return decisions + self._settle(now, acquisition.key.id)

    def transfer_moved(self, transfer_id: str, now: float) -> Decisions:
        """The broker has moved every byte: the source's slot is free, and the receiver verifies."""
        transfer = self.transfers.running.get(transfer_id)
        if transfer is None:
            return []
        transfer.is_moved = True
        self.acquisitions[transfer.acquisition_id].touched = True
        return self._endings.free_slot(transfer) + self._settle(now)

    def transfer_failed(
        self,
        transfer_id: str,
        instance_id: str,
        cause: FailureCause,
        detail: str,
        now: float,
        *,
        touched: bool = False,
        quiesced: bool = True,
        remedy: Remedy = Remedy.NONE,
    ) -> Decisions:
        """The transfer failed: the acquisition tries the next source, unless the receiver gave up, its deadline is over
        or its memory may still be written."""
        transfer, acquisition = self._of_receiver(transfer_id, instance_id)
        acquisition.touched = acquisition.touched or touched
        if cause is not FailureCause.RECEIVER and quiesced:
            return self._endings.try_next(transfer, cause, detail, now) + self._settle(now)
        decisions = self._endings.fail_transfer(transfer, cause, detail, now)
        error = answers.receiver_failed(detail, remedy, touched=acquisition.touched, quiesced=quiesced)
        return decisions + self.acquisitions.fail(acquisition, error) + self._settle(now, acquisition.key.id)

    def abandon(self, acquisition_id: str, now: float) -> Decisions:
        """The caller went away."""
        acquisition = self.acquisitions.find(acquisition_id)
        if acquisition is None:
            return []
        return self._endings.drop(acquisition, now) + self._settle(now)

    # Cold-load leases

    def lease_claimed(self, weight_set_id: str, claim: LeaseClaim, now: float) -> Decisions:
        """The directory's answer to `ClaimLease`."""
        record, claimant = self.weight_sets.end_claim(weight_set_id)
        record.lease = claim.lease
        decisions: Decisions = [WeightSetChanged(weight_set_id)]
        if claimant is None and claim.granted:
            # The claimant was served, cancelled or died meanwhile: the next waiter claims once the lease is free.
            return [*decisions, ReleaseLease(claim.lease)]
        if claimant is not None and claimant.rank is not None:
            decisions += self.groups.claimed(claimant, claim)
        elif claimant is not None and claim.granted:
            decisions += self.acquisitions.load_from_disk(claimant, claim.lease)
        return decisions + self._settle(now, weight_set_id)

    def claim_failed(self, weight_set_id: str, why: str, now: float) -> Decisions:
        """The directory did not answer `ClaimLease`: the claimant loads without a lease, the next waiter claims."""
        _, claimant = self.weight_sets.end_claim(weight_set_id)
        decisions: Decisions = [WeightSetChanged(weight_set_id)]
        if claimant is not None:
            decisions += self.acquisitions.fail(claimant, BrokerUnavailable(f"{why}; load from disk"))
        return decisions + self._settle(now, weight_set_id)

    def lease_ended(self, lease: ColdLoadLease, now: float) -> Decisions:
        """The lease was released or has expired: the next waiter may claim it."""
        record = self.weight_sets.find(lease.weight_set_id)
        if record is None or record.lease is None or record.lease.fencing_token != lease.fencing_token:
            return []
        record.lease = None
        return [WeightSetChanged(lease.weight_set_id), *self._settle(now, lease.weight_set_id)]

    def lease_extended(self, lease: ColdLoadLease) -> Decisions:
        """The directory has extended the lease."""
        record = self.weight_sets.find(lease.weight_set_id)
        if record is not None and record.lease is not None and record.lease.fencing_token == lease.fencing_token:
            record.lease = lease
        return [WeightSetChanged(lease.weight_set_id)]

    def declare_unpublishable(self, weight_set_id: str, why: str, now: float) -> Decisions:
        """The loader of the weight set cannot publish it: no acquisition waits for its publication."""
        record = self.weight_sets.find(weight_set_id)
        if record is None:
            return []
        self.weight_sets.note_unpublishable(record.key, why)
        return [WeightSetChanged(weight_set_id), *self._settle(now, weight_set_id)]

    # Time and drain

    def advance(self, now: float) -> Decisions:
        """Time passed: waiting acquisitions whose deadline is over are answered."""
        decisions = self.groups.advance(now)
        for acquisition in self.acquisitions.late(now):
            decisions += self.acquisitions.fail(acquisition, answers.late(acquisition, now))
        return decisions + self._settle(now)

    def next_deadline(self) -> float | None:
        """When `advance` is due next."""
        deadlines = (self.acquisitions.next_deadline(), self.groups.next_deadline())
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def drain(self, now: float) -> Decisions:
        """Refuse new work from now on; running transfers go on."""
        self.draining = True
        decisions: Decisions = []
        for acquisition in self.acquisitions.waiting:
            decisions += self.acquisitions.fail(acquisition, answers.draining())
        return decisions + self._settle(now)

    def cut_off(self, now: float) -> Decisions:
        """The broker stops: transfers that still run end here, and their callers get an error."""
        decisions: Decisions = []
        for transfer in list(self.transfers.running.values()):
            acquisition = self.acquisitions[transfer.acquisition_id]
            acquisition.touched = True
            decisions += self._endings.end_transfer(transfer, TransferState.FAILED, "the broker stopped", now)
            error = BrokerUnavailable("the broker stopped while the transfer ran; load from disk")
            decisions += self.acquisitions.fail(acquisition, error)
        return decisions + self._settle(now)

    # Questions

    def explain(self, question: Question) -> Explanation:
        """What a new acquisition on this host would get now. Changes nothing."""
        return answers.explain(question, self.publications, self.weight_sets, self.host_id, is_draining=self.draining)

    # What follows

    def _settle(self, now: float, *touched: str) -> Decisions:
        """Serves every weight set that the event touched, until nothing is left to serve."""
        self._endings.touch(*touched)
        decisions = self._end_groups()
        while (touch := self._endings.next_touched()) is not None:
            record, newcomers = self.weight_sets.find(touch[0]), touch[1]
            if record is not None:
                decisions += self._serve(record, now, list(record.waiting.values()) if newcomers is None else newcomers)
        return decisions

    def _serve(self, record: WeightSetRecord, now: float, waiting: list[Acquisition]) -> Decisions:
        """Answers each of these acquisitions of a weight set that can be answered now, first come first served."""
        decisions: Decisions = []
        selections: dict[Hashable, Selection[Publication]] = {}
        for acquisition in waiting:
            if acquisition.acquisition_id not in record.waiting:  # it ended with its group
                continue
            if acquisition.rank is not None:
                decisions += self.groups.serve(acquisition, now, is_draining=self.draining)
            else:
                decisions += self._serve_alone(record, acquisition, selections, now)
            decisions += self._end_groups()
        self.weight_sets.tidy(record.key.id)
        return decisions

    def _serve_alone(
        self,
        record: WeightSetRecord,
        acquisition: Acquisition,
        selections: dict[Hashable, Selection[Publication]],
        now: float,
    ) -> Decisions:
        """Serves an acquisition without a group. Sources are judged once for all receivers that are alike, until the
        publications change."""
        receiver = Receiver.of(acquisition, self.host_id)
        likeness = (receiver.likeness, self.publications.changes)
        if likeness not in selections:
            selections[likeness] = select(self.publications.of_weight_set(record.key.id), receiver)
        selection = selections[likeness]
        if selection.chosen is not None:
            return self.acquisitions.grant(acquisition, selection.chosen, now)
        return self._answer(record, acquisition, selection)

    def _answer(
        self, record: WeightSetRecord, acquisition: Acquisition, selection: Selection[Publication]
    ) -> Decisions:
        verdict = judge(Wish.of(acquisition), Situation.of(selection, record, is_draining=self.draining))
        if verdict in WAITS:
            lease = record.lease if verdict is Verdict.WAIT_COLD_LOAD else None
            return self.acquisitions.wait(acquisition, WAITS[verdict], lease)
        if verdict is Verdict.CLAIM_PENDING:
            return []
        if verdict is Verdict.CLAIM:
            record.claim_pending = acquisition.acquisition_id
            return [ClaimLease(record.key.id, acquisition.instance_id)]
        return self.acquisitions.fail(acquisition, answers.refusal(verdict, acquisition, selection, record))

    def _end_groups(self) -> Decisions:
        """Ends the groups of acquisitions that ended before their group."""
        decisions: Decisions = []
        while ended := self.acquisitions.left_group():
            for acquisition, why in ended:
                decisions += self.groups.member_ended(acquisition, why)
        return decisions

    def _of_receiver(self, transfer_id: str, instance_id: str) -> tuple[Transfer, Acquisition]:
        transfer = self.transfers.of_receiver(transfer_id, instance_id)
        return transfer, self.acquisitions[transfer.acquisition_id]

    def _attached(self, instance_id: str) -> Instance:
        """The instance of a call. It may have departed since the call was identified: then raises `NotAttached`."""
        instance = self.instances.get(instance_id)
        if instance is None:
            raise NotAttached(f"{instance_id} has departed; attach to attach.sock first")
        return instance

    def _check_not_draining(self) -> None:
        if self.draining:
            raise answers.draining()
