"""Coordinator and executor under random events: what instances, the directory, cards and the clock do, in any order."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, multiple, rule

from support.core_outcomes import concerns, outcome_of
from support.core_values import DATA_PLANES, DEVICES, KEYS, LAYOUTS, LEASE_SECONDS, OTHER_KINDS, WAIT_SECONDS
from weight_broker.errors import BrokerError, InvalidArgument, PublicationNotFound, Reason
from weight_broker.key import WeightSetKey
from weight_broker.kinds import TRAITS, MemoryKind
from weight_broker.layout import Layout
from weight_brokerd.control.executor import Executor
from weight_brokerd.core import decisions as decide
from weight_brokerd.core.answers import Question
from weight_brokerd.core.coordinator import Coordinator
from weight_brokerd.core.decisions import Decisions
from weight_brokerd.core.model import (
    Acquisition,
    Arrival,
    ColdLoadLease,
    FailureCause,
    Finding,
    IfAbsent,
    Instance,
    LeaseClaim,
    Limits,
    TransferPath,
)
from weight_brokerd.core.publications import Offer, Publication
from weight_brokerd.core.sources import Holder
from weight_brokerd.core.transfers import Transfer, TransferState
from weight_brokerd.directory.lease_table import LeaseTable


class CoreMachine(RuleBasedStateMachine):
    """Coordinator and executor, with ports whose answers come whenever they like."""

    instances = Bundle("instances")
    publications = Bundle("publications")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.number = 0
        self.coordinator = Coordinator(
            host_id="host", limits=Limits(readers_per_publication=2, publications=100), first_generation=7
        )
        self.executor = Executor(self)
        self.leases = LeaseTable()
        self.claims: list[decide.ClaimLease] = []
        self.answers: dict[str, decide.Decision] = {}
        self.seen: Decisions = []
        self.asked: set[str] = set()
        self.abandoned: set[str] = set()
        self.loading: dict[str, ColdLoadLease] = {}
        self.generations: set[int] = set()
        self.evicted: set[str] = set()
        self.mapping: list[Publication] = []
        self.reserving: list[Transfer] = []
        self.checking: list[Publication] = []
        self.writing: set[str] = set()
        self.granted: set[str] = set()
        self.held: dict[str, set[str]] = {}

    @property
    def open(self) -> list[str]:
        """Ids of the acquisitions that have not ended."""
        return [acquisition.acquisition_id for acquisition in self.coordinator.acquisitions]

    # What instances do

    @rule(target=instances)
    def attach(self) -> str:
        return self.new_instance()

    def new_instance(self) -> str:
        self.number += 1
        instance_id = f"instance-{self.number}"
        self.carry_out(self.coordinator.attach(Instance(instance_id, instance_id, self.number, 0, 0, self.now)))
        return instance_id

    @rule(instance_id=consumes(instances))
    def die(self, instance_id: str) -> None:
        acquisitions = list(self.coordinator.acquisitions)
        self.abandoned |= {owned.acquisition_id for owned in acquisitions if owned.instance_id == instance_id}
        self.carry_out(self.coordinator.depart(instance_id, self.now))
        assert not self.coordinator.publications.of_instance(instance_id)

    @rule(
        target=publications,
        instance_id=instances,
        key=st.sampled_from(KEYS),
        layout=st.sampled_from(LAYOUTS),
        fulfils=st.booleans(),
        device=st.sampled_from(DEVICES),
    )
    def publish(
        self,
        instance_id: str,
        key: WeightSetKey,
        layout: Layout,
        fulfils: bool,
        device: tuple[str, str] = DEVICES[0],
    ) -> object:
        self.number += 1
        lease = self.loading.get(key.id)
        token = lease.fencing_token if fulfils and lease is not None and lease.holder.instance_id == instance_id else 0
        offer = Offer(key, layout, instance_id, *device, token, f"request-{self.number}")
        try:
            publication, decisions = self.coordinator.publish(offer, self.now)
        except BrokerError as error:
            self.check_refusal(error, otherwise=Reason.LIMIT_EXCEEDED)
            return multiple()
        assert not self.coordinator.draining, "a publication was taken during a drain"
        assert publication.generation not in self.generations
        self.generations.add(publication.generation)
        self.carry_out(decisions)
        again, nothing = self.coordinator.publish(offer, self.now)
        assert again is publication
        assert nothing == []
        return publication.publication_id

    @rule(publication_id=publications)
    def retract(self, publication_id: str) -> None:
        publication = self.coordinator.publications.find(publication_id)
        if publication is None:
            return
        _, decisions = self.coordinator.retract(publication.instance_id, publication_id, self.now)
        self.carry_out(decisions)
        try:
            self.coordinator.retract("another", publication_id, self.now)
        except PublicationNotFound:
            return
        raise AssertionError("another instance could retract it")

    @rule(publication_id=publications)
    def quarantine(self, publication_id: str) -> None:
        if self.coordinator.publications.find(publication_id) is not None:
            self.carry_out(self.coordinator.quarantine(publication_id, "test", self.now)[1])

    @rule(publication_id=publications)
    def evict(self, publication_id: str) -> None:
        if self.coordinator.publications.find(publication_id) is not None:
            self.evicted.add(publication_id)
            self.carry_out(self.coordinator.evict(publication_id, self.now)[1])

    @rule(
        instance_id=instances,
        key=st.sampled_from(KEYS),
        layout=st.sampled_from([*LAYOUTS, None]),
        if_absent=st.sampled_from(list(IfAbsent)),
        device=st.sampled_from(DEVICES),
        other_kinds=st.sampled_from(OTHER_KINDS),
    )
    def acquire(
        self,
        instance_id: str,
        key: WeightSetKey,
        layout: Layout | None,
        if_absent: IfAbsent,
        device: tuple[str, str],
        other_kinds: frozenset[str],
    ) -> None:
        self.ask(instance_id, key, layout, if_absent, device, other_kinds)

    def ask(
        self,
        instance_id: str,
        key: WeightSetKey,
        layout: Layout | None,
        if_absent: IfAbsent,
        device: tuple[str, str] = DEVICES[0],
        other_kinds: frozenset[str] = frozenset(),
    ) -> None:
        self.number += 1
        acquisition = Acquisition(
            acquisition_id=f"acquisition-{self.number}",
            key=key,
            layout=layout,
            instance_id=instance_id,
            if_absent=if_absent,
            device_kind=device[0],
            device_id=device[1],
            path=TransferPath.COPY,
            begun_at=self.now,
            deadline=self.now + WAIT_SECONDS,
            other_kinds=other_kinds,
        )
        try:
            decisions = self.coordinator.acquire(acquisition, self.now)
        except BrokerError as error:
            self.check_refusal(error)
            return
        assert not self.coordinator.draining, "an acquisition was taken during a drain"
        self.asked.add(acquisition.acquisition_id)
        self.carry_out(decisions)

    @rule(
        instance_id=instances,
        key=st.sampled_from(KEYS),
        layout=st.sampled_from([*LAYOUTS, None]),
        device=st.sampled_from(DEVICES),
        other_kinds=st.sampled_from(OTHER_KINDS),
    )
    def explain_and_acquire(
        self,
        instance_id: str,
        key: WeightSetKey,
        layout: Layout | None,
        device: tuple[str, str],
        other_kinds: frozenset[str],
    ) -> None:
        """Explain says what acquire does."""
        apart_from = self.coordinator.damage.apart_from(self.coordinator.instances[instance_id].process)
        said = self.coordinator.explain(Question(key.id, key, layout, *device, other_kinds, apart_from)).outcome
        before = len(self.seen)
        self.ask(instance_id, key, layout, IfAbsent.LOAD, device, other_kinds)
        name = f"acquisition-{self.number}"
        followed = [decision for decision in self.seen[before:] if concerns(decision, name, key.id)]
        assert said is outcome_of(followed, is_draining=self.coordinator.draining)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        acquisitions = self.open
        if acquisitions:
            acquisition_id = data.draw(st.sampled_from(acquisitions))
            self.abandoned.add(acquisition_id)
            self.carry_out(self.coordinator.abandon(acquisition_id, self.now))

    @rule(data=st.data(), cause=st.sampled_from([None, *FailureCause]))
    def end_transfer(self, data: st.DataObject, cause: FailureCause | None) -> None:
        running = [one for one in self.coordinator.transfers.running.values() if one.transfer_id in self.granted]
        if not running:
            return
        self.report(data.draw(st.sampled_from(running)), cause)

    def report(self, transfer: Transfer, cause: FailureCause | None) -> None:
        receiver = transfer.receiver_instance_id
        if cause is None and transfer.broker_copies and not transfer.is_moved:
            with pytest.raises(InvalidArgument, match="has not moved every byte"):
                self.coordinator.transfer_succeeded(transfer.transfer_id, receiver, Arrival(8, (), "full"), self.now)
            return
        if cause is None:
            decisions = self.coordinator.transfer_succeeded(
                transfer.transfer_id, receiver, Arrival(8, (), "full"), self.now
            )
        else:
            decisions = self.coordinator.transfer_failed(transfer.transfer_id, receiver, cause, "test", self.now)
        self.carry_out(decisions)

    @rule(data=st.data(), works=st.booleans())
    def finish_reserving(self, data: st.DataObject, works: bool) -> None:
        if self.reserving:
            transfer = data.draw(st.sampled_from(self.reserving))
            self.reserving.remove(transfer)
            is_known = transfer.transfer_id in self.coordinator.transfers.running
            if works:
                decisions = self.coordinator.reserved(transfer.transfer_id, data.draw(DATA_PLANES))
            else:
                decisions = self.coordinator.not_reserved(transfer.transfer_id, "test", self.now)
            assert is_known or not decisions, "the answer comes too late and changes nothing"
            self.carry_out(decisions)

    @rule(data=st.data())
    def finish_moving(self, data: st.DataObject) -> None:
        if self.writing:
            transfer_id = data.draw(st.sampled_from(sorted(self.writing)))
            self.writing.discard(transfer_id)
            transfer = self.coordinator.transfers.running[transfer_id]
            self.carry_out(self.coordinator.transfer_moved(transfer_id, self.now))
            assert transfer.is_moved
            assert transfer.reader not in transfer.publication.readers, "its source is not needed any more"
            assert self.coordinator.transfer_moved("transfer-0", self.now) == []

    @rule(data=st.data(), works=st.booleans())
    def finish_mapping(self, data: st.DataObject, works: bool) -> None:
        if self.mapping:
            publication = data.draw(st.sampled_from(self.mapping))
            self.mapping.remove(publication)
            if works:
                self.carry_out(self.coordinator.held(publication, self.now))
            else:
                self.carry_out(self.coordinator.not_held(publication, self.now))

    @rule(data=st.data(), finding=st.sampled_from(Finding))
    def finish_checking(self, data: st.DataObject, finding: Finding) -> None:
        if self.checking:
            publication = data.draw(st.sampled_from(self.checking))
            self.checking.remove(publication)
            self.carry_out(self.coordinator.checked(publication, finding, "test", self.now))

    @rule(publication_id=publications)
    def lose(self, publication_id: str) -> None:
        publication = self.coordinator.publications.find(publication_id)
        if publication is not None and publication.device_kind != MemoryKind.CPU:
            self.carry_out(self.coordinator.lose(publication_id, "test", self.now))

    @rule(key=st.sampled_from(KEYS), why=st.sampled_from(["", "it moved"]))
    def declare_unpublishable(self, key: WeightSetKey, why: str) -> None:
        self.carry_out(self.coordinator.declare_unpublishable(key.id, why, self.now))

    @rule(data=st.data())
    def give_up_load(self, data: st.DataObject) -> None:
        if self.loading:
            lease = data.draw(st.sampled_from(list(self.loading.values())))
            self.give_back(lease)

    # What the directory and the clock do

    @rule(data=st.data())
    def answer_claim(self, data: st.DataObject) -> None:
        if self.claims:
            claim = data.draw(st.sampled_from(self.claims))
            self.claims.remove(claim)
            answer = self.claim_of(claim)
            self.carry_out(self.coordinator.lease_claimed(claim.weight_set_id, answer, self.now))

    def claim_of(self, claim: decide.ClaimLease) -> LeaseClaim:
        holder = Holder("host", claim.instance_id)
        return self.leases.claim(claim.weight_set_id, holder, now=self.now, seconds=LEASE_SECONDS)

    @rule(data=st.data())
    def fail_claim(self, data: st.DataObject) -> None:
        if self.claims:
            claim = data.draw(st.sampled_from(self.claims))
            self.claims.remove(claim)
            self.carry_out(self.coordinator.claim_failed(claim.weight_set_id, "test", self.now))

    @rule(seconds=st.floats(0.1, 100.0))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for lease in self.leases.expire(self.now):
            self.forget_load(lease)
            self.carry_out(self.coordinator.lease_ended(lease, self.now))
        self.carry_out(self.coordinator.advance(self.now))

    # Carrying decisions out, and checking each

    def check_refusal(self, error: BrokerError, otherwise: Reason | None = None) -> None:
        assert error.reason is (Reason.DRAINING if self.coordinator.draining else otherwise)

    def carry_out(self, decisions: Decisions) -> None:
        self.seen += decisions
        self.executor.carry_out(decisions)

    # Ports: each action is kept until a rule ends it, in any order

    def answer(self, answer: decide.Answer) -> None:
        match answer:
            case decide.Wait():
                pass
            case decide.Grant(acquisition_id, transfer):
                assert acquisition_id not in self.answers
                self.granted.add(transfer.transfer_id)
            case decide.LoadFromDisk(acquisition_id, lease):
                assert lease.weight_set_id not in self.loading, "two instances load"
                self.loading[lease.weight_set_id] = lease
                self.end_acquisition(acquisition_id, answer)
            case decide.Complete(acquisition_id) | decide.Fail(acquisition_id):
                self.end_acquisition(acquisition_id, answer)

    def end_acquisition(self, acquisition_id: str, answer: decide.Answer) -> None:
        assert acquisition_id not in self.answers, "answered twice"
        assert acquisition_id not in self.abandoned, "answered after it was abandoned"
        self.answers[acquisition_id] = answer

    def hold(self, publication: Publication) -> None:
        if TRAITS[publication.device_kind].has_devices:
            self.mapping.append(publication)
        else:  # at once, while the executor works: what follows comes after what is queued
            self.carry_out(self.coordinator.held(publication, self.now))

    def release(self, publication: Publication) -> None:
        readers = self.held.get(publication.publication_id, set())
        if not TRAITS[publication.device_kind].outlives_owner:  # it may be freed now
            assert not readers & self.writing, "device memory was given back while the broker read it"
            return
        died = publication.instance_id not in self.coordinator.instances
        forced = died or publication.publication_id in self.evicted
        assert forced or not readers, "memory was given back while a transfer read it"

    def reserve(self, transfer: Transfer) -> None:
        publication = transfer.publication
        assert len(publication.readers) <= publication.reader_limit
        assert transfer.acquisition_id not in self.answers
        self.held.setdefault(publication.publication_id, set()).add(transfer.transfer_id)
        self.reserving.append(transfer)

    def move(self, transfer: Transfer) -> None:
        assert transfer.transfer_id in self.granted
        if transfer.state is TransferState.RUNNING:
            assert transfer.data_plane.is_known
            self.writing.add(transfer.transfer_id)

    def end(self, transfer: Transfer) -> None:
        self.held[transfer.publication.publication_id].remove(transfer.transfer_id)
        self.writing.discard(transfer.transfer_id)

    def claim(self, weight_set_id: str, instance_id: str) -> None:
        self.claims.append(decide.ClaimLease(weight_set_id, instance_id))

    def give_back(self, lease: ColdLoadLease) -> None:
        self.forget_load(lease)
        if self.leases.release(lease):
            self.carry_out(self.coordinator.lease_ended(lease, self.now))

    def check(self, publication: Publication) -> None:
        assert publication not in self.checking, "one check at a time"
        self.checking.append(publication)

    def notice(self, notice: decide.Notice) -> None:
        pass

    def failed(self, decision: decide.Decision, error: Exception) -> None:
        raise error

    def settled(self) -> None:
        pass

    def forget_load(self, lease: ColdLoadLease) -> None:
        held = self.loading.get(lease.weight_set_id)
        if held is not None and held.fencing_token == lease.fencing_token:
            del self.loading[lease.weight_set_id]

    def teardown(self) -> None:
        for _ in range(1000):
            if not self.coordinator.acquisitions:
                break
            for transfer in list(self.coordinator.transfers.running.values()):
                self.report(transfer, FailureCause.SOURCE_UNREACHABLE)
            self.now += WAIT_SECONDS
            self.carry_out(self.coordinator.advance(self.now))
        assert not self.coordinator.acquisitions, "somebody was never answered"
        for instance_id in list(self.coordinator.instances):
            self.carry_out(self.coordinator.depart(instance_id, self.now))
        while self.claims:
            claim = self.claims.pop()
            answer = self.claim_of(claim)
            self.carry_out(self.coordinator.lease_claimed(claim.weight_set_id, answer, self.now))
        for lease in self.leases.expire(self.now + 10 * LEASE_SECONDS):
            self.carry_out(self.coordinator.lease_ended(lease, self.now))
        for key in KEYS:
            self.carry_out(self.coordinator.declare_unpublishable(key.id, "", self.now))
        assert len(self.coordinator.publications) == 0
        assert list(self.coordinator.weight_sets) == [], "a weight set outlived everything that referred to it"
