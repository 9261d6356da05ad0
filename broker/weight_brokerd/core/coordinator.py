"""Turns events into decisions: who reads from whom, who loads from disk, who waits.

Every method is one event; it changes the state and returns what follows from it. Nothing here blocks, reads a clock or
touches a device, so that any interleaving of events can be replayed in a test.
"""

from __future__ import annotations

from weight_broker.errors import (
    AcquireTimeout,
    BrokerError,
    BrokerUnavailable,
    IntegrityError,
    InvalidArgument,
    LayoutMismatch,
    LeaseLost,
    PublicationNotFound,
    Reason,
    TransferFailed,
    WeightsNotFound,
    from_reason,
)
from weight_broker.kinds import TRAITS
from weight_brokerd.core.decisions import (
    ClaimLease,
    Complete,
    Decision,
    EndTransfer,
    Fail,
    Grant,
    InstanceChanged,
    Map,
    ReleaseLease,
    TellColdLoad,
    TransferChanged,
    Unmap,
    Wait,
    WeightSetChanged,
)
from weight_brokerd.core.load_groups import LoadGroups
from weight_brokerd.core.model import (
    Acquisition,
    Arrival,
    ColdLoadLease,
    FailureCause,
    IfAbsent,
    Instance,
    InstanceState,
    LeaseClaim,
    Limits,
    Offer,
    Publication,
    PublicationState,
    Transfer,
    TransferState,
    WaitReason,
)
from weight_brokerd.core.publications import Registry
from weight_brokerd.core.selection import Receiver, Refusal, Selection, select
from weight_brokerd.core.transfers import TransferLog
from weight_brokerd.core.weight_sets import WeightSetIndex, WeightSetRecord

Decisions = list[Decision]
STAGE_INSTEAD = {"path": "staged"}
"""Metadata of an error after which the same may be asked for with the staged path."""


class Coordinator:
    """The broker's mind."""

    def __init__(self, *, host_id: str, limits: Limits, first_generation: int = 1) -> None:
        self.host_id = host_id
        self.limits = limits
        self.draining = False
        self.instances: dict[str, Instance] = {}
        self.registry = Registry(
            host_id=host_id,
            first_generation=first_generation,
            limit=limits.publications,
            readers_per_publication=limits.readers_per_publication,
        )
        self.transfers = TransferLog(limits.transfers_remembered)
        self.weight_sets = WeightSetIndex(self.registry)
        self.acquisitions: dict[str, Acquisition] = {}
        self.groups = LoadGroups(self)

    # Instances

    def attach(self, instance: Instance) -> Decisions:
        """A process attached. Allowed during a drain: administrators attach too."""
        if len(self.instances) >= self.limits.instances:
            raise from_reason(
                Reason.LIMIT_EXCEEDED,
                f"this broker already has {self.limits.instances} instances; raise limits.instances",
                metadata={"limit": "limits.instances", "value": str(self.limits.instances)},
            )
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
        """The process died or said goodbye: everything it held ends."""
        if self.instances.pop(instance_id, None) is None:
            return []
        published = self.registry.of_instance(instance_id)
        acquiring = [one for one in self.acquisitions.values() if one.instance_id == instance_id]
        decisions: Decisions = []
        for acquisition in acquiring:
            decisions += self._drop(acquisition, now)
        for publication in published:
            if publication.state is not PublicationState.GONE:  # it may have waited for a reader that was dropped
                decisions += self._end_publication(publication, "its instance ended", now)
        # Only now: nobody is to read from it any more, and it is to be told nothing.
        for weight_set_id in dict.fromkeys(
            [*(one.weight_set_id for one in published), *(one.key.id for one in acquiring)]
        ):
            decisions += self._serve_id(weight_set_id, now)
        for record in self.weight_sets:
            if record.lease is not None and record.lease.instance_id == instance_id:
                decisions.append(ReleaseLease(record.lease))
        decisions.append(InstanceChanged(instance_id))
        return decisions

    # Publications

    def publish(self, offer: Offer, now: float) -> tuple[Publication, Decisions]:
        """An instance offers a weight set; it is readable once `mapped` says so."""
        self._check_not_draining()
        earlier = self.registry.of_request(offer.instance_id, offer.request_id)
        if earlier is not None:
            if earlier.key != offer.key or earlier.layout != offer.layout:
                raise from_reason(
                    Reason.INVALID_ARGUMENT,
                    f"request_id {offer.request_id!r} was used for another publication; use a new one",
                    metadata={"field": "request_id"},
                )
            return earlier, []
        instance = self.instances[offer.instance_id]
        publication = self.registry.add(offer, instance_name=instance.name, now=now)
        self.weight_sets.record(offer.key)
        return publication, [Map(publication)]

    def mapped(self, publication: Publication, now: float) -> Decisions:
        """The publication's memory is mapped: it is resident, and a lease that it fulfils ends."""
        if publication.state is not PublicationState.REGISTERING:
            return []
        self.registry.move(publication, PublicationState.RESIDENT)
        self.weight_sets.note_unpublishable(publication.key, "")
        decisions: Decisions = [
            WeightSetChanged(publication.weight_set_id),
            InstanceChanged(publication.instance_id),
        ]
        record = self.weight_sets.record(publication.key)
        lease = record.lease
        fulfilled = (publication.instance_id, publication.fencing_token)
        if lease is not None and (lease.instance_id, lease.fencing_token) == fulfilled:
            decisions.append(ReleaseLease(lease))
        return decisions + self._serve(record, now)

    def mapping_failed(self, publication: Publication, now: float) -> Decisions:
        """The publication's memory cannot be mapped: it never was."""
        if publication.state is PublicationState.REGISTERING:
            return self._end_publication(publication) + self._serve_id(publication.weight_set_id, now)
        return []

    def retract(self, instance_id: str, publication_id: str, now: float) -> tuple[Publication, Decisions]:
        """The instance wants its memory back: no new readers. It is gone when the last one has ended."""
        publication = self.registry.find(publication_id)
        if publication is None or publication.instance_id != instance_id:
            raise PublicationNotFound(
                f"this instance has no publication {publication_id!r}; it is gone or belongs to another instance",
                metadata={"publication_id": publication_id},
            )
        if publication.state is PublicationState.REGISTERING or not publication.readers:
            return publication, self._end_publication(publication) + self._serve_id(publication.weight_set_id, now)
        if publication.state is not PublicationState.RETRACTING:
            self.registry.move(publication, PublicationState.RETRACTING)
        return publication, self._left(publication, now)

    def evict(self, publication_id: str, now: float) -> tuple[Publication, Decisions]:
        """An administrator takes a publication out of service, without waiting for readers."""
        publication = self.registry.get(publication_id)
        ended = self._end_publication(publication, "it was evicted", now)
        return publication, ended + self._serve_id(publication.weight_set_id, now)

    def lose(self, publication_id: str, why: str, now: float) -> Decisions:
        """The memory of a publication cannot be reached any more."""
        publication = self.registry.find(publication_id)
        if publication is None:
            return []
        return self._end_publication(publication, why, now) + self._serve_id(publication.weight_set_id, now)

    def quarantine(self, publication_id: str, reason: str, now: float) -> tuple[Publication, Decisions]:
        """The publication is never read again, but shown."""
        publication = self.registry.get(publication_id)
        if publication.state is PublicationState.RESIDENT:
            self.registry.move(publication, PublicationState.QUARANTINED)
            publication.quarantine_reason = reason
        return publication, self._left(publication, now)

    # Acquisitions

    def acquire(self, acquisition: Acquisition, now: float) -> Decisions:
        """An instance asks for a weight set."""
        self._check_not_draining()
        self.acquisitions[acquisition.acquisition_id] = acquisition
        record = self.weight_sets.record(acquisition.key)
        record.waiting[acquisition.acquisition_id] = acquisition
        refused = self.groups.join(acquisition, acquisition.rank) if acquisition.rank is not None else None
        if refused is not None:
            return self._fail(acquisition, refused)
        return [*self._serve(record, now), WeightSetChanged(record.key.id)]

    def transfer_succeeded(self, transfer_id: str, instance_id: str, arrival: Arrival, now: float) -> Decisions:
        """Every byte of the transfer arrived and was verified."""
        transfer, acquisition = self._running(transfer_id, instance_id)
        if transfer.is_brokers and not transfer.is_moved:
            raise InvalidArgument("outcome", "succeeded", "failed: the broker has not moved every byte yet")
        transfer.publication.served_count += 1
        decisions = self._end_transfer(transfer, TransferState.SUCCEEDED, "", now)
        if acquisition.rank is not None:
            decisions += self.groups.arrived(acquisition, transfer, arrival, now)
        else:
            self._forget(acquisition)
            decisions.append(Complete(acquisition.acquisition_id, transfer, arrival))
        return decisions + self._serve_id(acquisition.key.id, now)

    def transfer_moved(self, transfer_id: str, now: float) -> Decisions:
        """The broker has moved every byte: the source is not needed any more, the receiver verifies."""
        transfer = self.transfers.running.get(transfer_id)
        if transfer is None:
            return []
        transfer.is_moved = True
        self.acquisitions[transfer.acquisition_id].touched = True
        return self._let_out(transfer) + self._serve_id(transfer.publication.weight_set_id, now)

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
        needs_staging: bool = False,
    ) -> Decisions:
        """The transfer did not complete: the acquisition tries the next source, unless the receiver gave up, its time
        is over or somebody may still write to its memory. `needs_staging`: it fails, and may be repeated with another
        path."""
        transfer, acquisition = self._running(transfer_id, instance_id)
        acquisition.touched = acquisition.touched or touched
        publication = transfer.publication
        decisions = self._end_transfer(transfer, TransferState.FAILED, detail or cause, now)
        record = self.weight_sets.record(acquisition.key)
        if cause is FailureCause.DIGEST_MISMATCH:
            acquisition.saw_wrong_bytes = True
            if publication.state is not PublicationState.GONE:
                decisions += self.quarantine(
                    publication.publication_id, f"delivered wrong bytes in {transfer_id}: {detail}", now
                )[1]
        if cause is FailureCause.RECEIVER or not quiesced:
            who = "the receiver cannot take it" if needs_staging else "the receiver gave up"
            who = who if quiesced else "the transfer failed, and somebody may still write"
            metadata = STAGE_INSTEAD if needs_staging else None
            error = TransferFailed(f"{who}: {detail}", quiesced=quiesced, metadata=metadata)
            decisions += self._fail(acquisition, error)
        elif transfer.is_brokers and acquisition.deadline <= now:
            decisions += self._fail(acquisition, _late(acquisition, now))
        else:
            acquisition.failed_sources[publication.publication_id] = f"{cause}: {detail}"
            acquisition.transfer_id = ""
            record.waiting[acquisition.acquisition_id] = acquisition
        return decisions + self._serve(record, now)

    def abandon(self, acquisition_id: str, now: float) -> Decisions:
        """The caller went away."""
        acquisition = self.acquisitions.get(acquisition_id)
        if acquisition is None:
            return []
        return self._drop(acquisition, now) + self._serve_id(acquisition.key.id, now)

    # Cold-load leases

    def lease_claimed(self, weight_set_id: str, claim: LeaseClaim, now: float) -> Decisions:
        """The directory's answer to `ClaimLease`."""
        record = self.weight_sets.find(weight_set_id)
        if record is None or record.claim_pending is None:
            raise AssertionError(f"no claim is pending for weight set {weight_set_id}")
        claimant, record.claim_pending = record.waiting.get(record.claim_pending), None
        record.lease = claim.lease
        decisions: Decisions = [WeightSetChanged(weight_set_id)]
        if claimant is not None and claimant.rank is not None:
            return decisions + self.groups.claimed(claimant, claim, now) + self._serve_id(weight_set_id, now)
        if claim.granted:
            if claimant is None:  # served, cancelled or dead meanwhile; the next waiter gets its chance when it is free
                return [*decisions, ReleaseLease(claim.lease)]
            self._forget(claimant)
            decisions.append(TellColdLoad(claimant.acquisition_id, claim.lease))
        return decisions + self._serve(record, now)

    def claim_failed(self, weight_set_id: str, why: str, now: float) -> Decisions:
        """The directory did not answer `ClaimLease`: its asker loads without a lease, the next waiter asks again."""
        record = self.weight_sets.find(weight_set_id)
        if record is None or record.claim_pending is None:
            raise AssertionError(f"no claim is pending for weight set {weight_set_id}")
        claimant, record.claim_pending = record.waiting.get(record.claim_pending), None
        decisions: Decisions = [WeightSetChanged(weight_set_id)]
        if claimant is not None:
            decisions += self._fail(claimant, BrokerUnavailable(f"{why}; load from disk"))
        return decisions + self._serve(record, now)

    def lease_free(self, lease: ColdLoadLease, now: float) -> Decisions:
        """The lease ended, for whatever reason: the next waiter may claim it."""
        record = self.weight_sets.find(lease.weight_set_id)
        if record is None or record.lease is None or record.lease.fencing_token != lease.fencing_token:
            return []
        record.lease = None
        return [WeightSetChanged(lease.weight_set_id), *self._serve(record, now)]

    def lease_extended(self, lease: ColdLoadLease) -> Decisions:
        """The directory has extended the lease."""
        record = self.weight_sets.find(lease.weight_set_id)
        if record is not None and record.lease is not None and record.lease.fencing_token == lease.fencing_token:
            record.lease = lease
        return [WeightSetChanged(lease.weight_set_id)]

    def declare_unpublishable(self, weight_set_id: str, why: str, now: float) -> Decisions:
        """Whoever loads the weight set cannot publish it: nobody is to wait for that."""
        record = self.weight_sets.find(weight_set_id)
        if record is None:
            return []
        self.weight_sets.note_unpublishable(record.key, why)
        return [WeightSetChanged(weight_set_id), *self._serve(record, now)]

    def lease_held_by(self, instance_id: str, weight_set_id: str, fencing_token: int) -> ColdLoadLease:
        """The lease, if this instance holds it with this token; raises `LeaseLost`."""
        record = self.weight_sets.find(weight_set_id)
        lease = record.lease if record is not None else None
        if lease is None or lease.instance_id != instance_id or lease.fencing_token != fencing_token:
            raise LeaseLost(
                f"this instance does not hold cold-load lease {fencing_token} of weight set {weight_set_id!r}",
                metadata={"weight_set_id": weight_set_id, "fencing_token": str(fencing_token)},
            )
        return lease

    # Time and drain

    def advance(self, now: float) -> Decisions:
        """Time passed: waiting acquisitions whose deadline is over are answered."""
        decisions = self.groups.advance(now)
        late = [one for one in self.acquisitions.values() if one.deadline <= now and not one.transfer_id]
        for acquisition in late:
            decisions += self._fail(acquisition, _late(acquisition, now))
        return decisions

    def next_deadline(self) -> float | None:
        """When `advance` next has something to do."""
        deadlines = [one.deadline for one in self.acquisitions.values() if not one.transfer_id]
        of_groups = self.groups.next_deadline()
        return min(deadlines if of_groups is None else [*deadlines, of_groups], default=None)

    def drain(self) -> Decisions:
        """Nothing new from now on; running transfers go on."""
        self.draining = True
        decisions: Decisions = []
        for acquisition in [one for one in self.acquisitions.values() if not one.transfer_id]:
            decisions += self._fail(acquisition, _draining())
        return decisions

    def cut_off(self, now: float) -> Decisions:
        """The broker stops: transfers that still run end here, and their callers are told so."""
        decisions: Decisions = []
        for transfer in list(self.transfers.running.values()):
            acquisition = self.acquisitions[transfer.acquisition_id]
            acquisition.touched = True
            decisions += self._end_transfer(transfer, TransferState.FAILED, "the broker stopped", now)
            error = BrokerUnavailable("the broker stopped while the transfer ran; load from disk")
            decisions += self._fail(acquisition, error)
        return decisions

    def receiver(self, acquisition: Acquisition) -> Receiver:
        """The receiving side of an acquisition, as selection sees it."""
        return Receiver(
            self.host_id,
            acquisition.device_kind,
            acquisition.device_id,
            acquisition.layout,
            acquisition.failed_sources,
        )

    # What follows

    def _serve_id(self, weight_set_id: str, now: float) -> Decisions:
        record = self.weight_sets.find(weight_set_id)
        return self._serve(record, now) if record is not None else []

    def _serve(self, record: WeightSetRecord, now: float) -> Decisions:
        """Answers every waiting acquisition of a weight set that can be answered now, first come first served."""
        decisions: Decisions = []
        for acquisition in list(record.waiting.values()):
            if acquisition.acquisition_id not in record.waiting:  # told with its group
                continue
            if acquisition.rank is not None:
                decisions += self.groups.serve(acquisition, now)
                continue
            selection = select(self.registry.of_weight_set(record.key.id), self.receiver(acquisition))
            if selection.chosen is not None:
                decisions += self._grant(acquisition, selection.chosen, now)
            else:
                decisions += self._without_source(record, acquisition, selection)
        self.weight_sets.tidy(record.key.id)
        return decisions

    def _grant(self, acquisition: Acquisition, publication: Publication, now: float) -> Decisions:
        transfer = self.transfers.begin(acquisition, publication, now)
        self.registry.reserve(publication, transfer.transfer_id)
        acquisition.transfer_id = transfer.transfer_id
        acquisition.told = None
        del self.weight_sets.record(acquisition.key).waiting[acquisition.acquisition_id]
        return [
            Grant(acquisition.acquisition_id, transfer),
            TransferChanged(transfer),
            WeightSetChanged(publication.weight_set_id),
        ]

    def _without_source(self, record: WeightSetRecord, acquisition: Acquisition, selection: Selection) -> Decisions:
        if selection.has(Refusal.BUSY) and not self.draining:  # else its source failed while the broker drains
            return self._wait(acquisition, WaitReason.SOURCES_BUSY, None)
        is_patient = acquisition.if_absent is not IfAbsent.FAIL and not self.draining
        if is_patient and selection.is_coming and record.lease is None:
            return self._wait(acquisition, WaitReason.REGISTERING, None)
        refused = self._refusal(record, acquisition, selection)
        if refused is not None:
            return self._fail(acquisition, refused)
        if acquisition.if_absent is IfAbsent.LOAD:
            if record.lease is not None:
                return self._wait(acquisition, WaitReason.COLD_LOAD, record.lease)
            if record.claim_pending is None:
                record.claim_pending = acquisition.acquisition_id
                return [ClaimLease(record.key.id, acquisition.instance_id)]
            return []
        if acquisition.if_absent is IfAbsent.WAIT and not acquisition.failed_sources:
            if record.lease is not None:
                return self._wait(acquisition, WaitReason.COLD_LOAD, record.lease)
            if record.claim_pending is not None:
                return []
        return self._fail(acquisition, self._absent(acquisition))

    def _refusal(self, record: WeightSetRecord, acquisition: Acquisition, selection: Selection) -> BrokerError | None:
        """Why there is nothing to wait for and no lease to be had."""
        if self.draining:
            return _draining()
        if selection.chosen is None and selection.has(Refusal.LAYOUT_DIFFERS):
            return _layout_mismatch(acquisition, selection)
        if record.unpublishable:
            return WeightsNotFound(
                f"weight set {record.key.id} cannot be published: {record.unpublishable}; load from disk",
                metadata={"weight_set_id": record.key.id, "unpublishable": record.unpublishable},
            )
        return None

    @staticmethod
    def _absent(acquisition: Acquisition) -> BrokerError:
        tried = acquisition.failed_sources
        if not tried:
            return WeightsNotFound(
                f"nobody holds weight set {acquisition.key.id} (model {acquisition.key.model!r}); load from disk",
                metadata={"weight_set_id": acquisition.key.id},
            )
        kind = IntegrityError if acquisition.saw_wrong_bytes else TransferFailed
        return kind(
            f"every source of weight set {acquisition.key.id} failed: "
            + "; ".join(f"{source}: {why}" for source, why in tried.items()),
            metadata={"weight_set_id": acquisition.key.id, "sources": ", ".join(tried)},
        )

    def _wait(self, acquisition: Acquisition, reason: WaitReason, lease: ColdLoadLease | None) -> Decisions:
        telling = (reason, lease.fencing_token if lease is not None else 0)
        if acquisition.told == telling:
            return []
        acquisition.told = telling
        return [Wait(acquisition.acquisition_id, reason, lease)]

    def _fail(self, acquisition: Acquisition, error: BrokerError) -> Decisions:
        if acquisition.acquisition_id not in self.acquisitions:  # it has failed with its group
            return []
        self._forget(acquisition)
        error.touched = error.touched or acquisition.touched
        failed = Fail(acquisition.acquisition_id, error)
        return [failed, WeightSetChanged(acquisition.key.id), *self.groups.left(acquisition, error.message)]

    def _forget(self, acquisition: Acquisition) -> None:
        self.acquisitions.pop(acquisition.acquisition_id, None)
        record = self.weight_sets.find(acquisition.key.id)
        if record is not None:
            record.waiting.pop(acquisition.acquisition_id, None)
            self.weight_sets.tidy(record.key.id)

    def _drop(self, acquisition: Acquisition, now: float) -> Decisions:
        """Ends an acquisition that nobody hears the end of."""
        decisions: Decisions = []
        transfer = self.transfers.running.get(acquisition.transfer_id)
        if transfer is not None:
            decisions += self._end_transfer(transfer, TransferState.FAILED, "the receiver went away", now)
        self._forget(acquisition)
        decisions.append(WeightSetChanged(acquisition.key.id))
        return decisions + self.groups.left(acquisition, "its process went away")

    def _end_transfer(self, transfer: Transfer, state: TransferState, failure: str, now: float) -> Decisions:
        self.transfers.end(transfer, state, failure, now)
        return [EndTransfer(transfer), TransferChanged(transfer), *self._let_out(transfer)]

    def _let_out(self, transfer: Transfer) -> Decisions:
        """Nothing of the source is read any more by this transfer."""
        publication = transfer.publication
        if transfer.transfer_id not in publication.readers:
            return []
        self.registry.release(publication, transfer.transfer_id)
        if publication.state is PublicationState.RETRACTING and not publication.readers:
            return self._end_publication(publication)
        return [WeightSetChanged(publication.weight_set_id)]

    def _end_publication(self, publication: Publication, why: str = "", now: float = 0.0) -> Decisions:
        """It is gone. Host memory lives on for whoever reads it now; device memory may go with its owner, so who reads
        that is sent to another source; call `_serve_id` then."""
        self.registry.move(publication, PublicationState.GONE)
        decisions: Decisions = []
        if not TRAITS[publication.device_kind].outlives_owner:
            for transfer_id in sorted(publication.readers):
                decisions += self._source_lost(self.transfers.running[transfer_id], why, now)
        self.weight_sets.tidy(publication.weight_set_id)
        return [
            *decisions,
            Unmap(publication),
            WeightSetChanged(publication.weight_set_id),
            InstanceChanged(publication.instance_id),
        ]

    def _source_lost(self, transfer: Transfer, why: str, now: float) -> Decisions:
        acquisition = self.acquisitions[transfer.acquisition_id]
        acquisition.touched = True
        acquisition.failed_sources[transfer.publication.publication_id] = why
        acquisition.transfer_id = ""
        self.weight_sets.record(acquisition.key).waiting[acquisition.acquisition_id] = acquisition
        return self._end_transfer(transfer, TransferState.FAILED, why, now)

    def _left(self, publication: Publication, now: float) -> Decisions:
        """Nobody else may read from it: who waited for one of its slots need not wait for its readers."""
        return [WeightSetChanged(publication.weight_set_id), *self._serve_id(publication.weight_set_id, now)]

    def _running(self, transfer_id: str, instance_id: str) -> tuple[Transfer, Acquisition]:
        transfer = self.transfers.running.get(transfer_id)
        if transfer is None or transfer.receiver_instance_id != instance_id:
            raise from_reason(
                Reason.TRANSFER_NOT_FOUND,
                f"no transfer {transfer_id!r} runs for this instance",
                metadata={"transfer_id": transfer_id},
            )
        return transfer, self.acquisitions[transfer.acquisition_id]

    def _check_not_draining(self) -> None:
        if self.draining:
            raise _draining()


def _late(acquisition: Acquisition, now: float) -> AcquireTimeout:
    waited = now - acquisition.begun_at
    return AcquireTimeout(f"weight set {acquisition.key.id} did not arrive in {waited:.1f} s")


def _draining() -> BrokerUnavailable:
    return BrokerUnavailable("the broker is draining and takes no new work; load from disk", reason=Reason.DRAINING)


def _layout_mismatch(acquisition: Acquisition, selection: Selection) -> LayoutMismatch:
    refused = [candidate for candidate in selection.candidates if candidate.refusal is Refusal.LAYOUT_DIFFERS]
    newest = refused[-1]
    return LayoutMismatch(
        f"weight set {acquisition.key.id} is resident with another layout: {newest.detail}",
        metadata={
            "weight_set_id": acquisition.key.id,
            "publication_id": newest.publication.publication_id,
            "differences": newest.detail,
        },
    )
