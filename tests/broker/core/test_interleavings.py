"""Any interleaving of what instances do, of deaths, of the directory's answers and of time keeps the promises."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from weight_broker.errors import BrokerError, InvalidArgument, PublicationNotFound, Reason
from weight_broker.key import WeightSetKey
from weight_broker.kinds import TRAITS
from weight_broker.layout import Layout, TensorSpec
from weight_brokerd.core import decisions as decide
from weight_brokerd.core.coordinator import Coordinator, Decisions
from weight_brokerd.core.model import (
    Acquisition,
    Arrival,
    ColdLoadLease,
    DataPlane,
    FailureCause,
    IfAbsent,
    Instance,
    Limits,
    Offer,
    Publication,
    PublicationState,
    Transfer,
    TransferPath,
)
from weight_brokerd.directory.lease_table import LeaseTable

KEYS = [WeightSetKey("model-a"), WeightSetKey("model-b")]
LAYOUTS = [
    Layout([TensorSpec("weight", "bfloat16", (4,), (1,), 8)]),
    Layout([TensorSpec("weight", "bfloat16", (8,), (1,), 16)]),
]
DEVICES = [("cpu", ""), ("npu", "npu:0"), ("npu", "npu:1")]
"""Kinds of memory and cards: host memory is copied by its receiver, device memory by the broker."""
LEASE_SECONDS = 60.0
WAIT_SECONDS = 300.0


class Core(RuleBasedStateMachine):
    """The coordinator with a directory that answers whenever it likes."""

    instances = Bundle("instances")
    publications = Bundle("publications")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.number = 0
        self.coordinator = Coordinator(
            host_id="host", limits=Limits(readers_per_publication=2, publications=100), first_generation=7
        )
        self.leases = LeaseTable()
        self.claims: list[decide.ClaimLease] = []
        self.answers: dict[str, decide.Decision] = {}
        self.asked: set[str] = set()
        self.abandoned: set[str] = set()
        self.loading: dict[str, ColdLoadLease] = {}
        self.generations: set[int] = set()
        self.evicted: set[str] = set()
        self.mapping: list[Publication] = []
        """Publications in device memory whose card has not said yet whether it can map them."""
        self.writing: set[str] = set()
        """Transfers whose bytes the broker moves now."""
        self.held: dict[str, set[str]] = {}
        """Transfers that hold a publication's memory, by publication."""

    # What instances do

    @rule(target=instances)
    def attach(self) -> str:
        return self.new_instance()

    def new_instance(self) -> str:
        self.number += 1
        instance_id = f"instance-{self.number}"
        self.carry_out(self.coordinator.attach(Instance(instance_id, instance_id, 1, 0, 0, self.now)))
        return instance_id

    @rule(instance_id=consumes(instances))
    def die(self, instance_id: str) -> None:
        for acquisition in list(self.coordinator.acquisitions.values()):
            if acquisition.instance_id == instance_id:
                self.abandoned.add(acquisition.acquisition_id)
        self.carry_out(self.coordinator.depart(instance_id, self.now))
        assert not self.coordinator.registry.of_instance(instance_id)

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
        token = lease.fencing_token if fulfils and lease is not None and lease.instance_id == instance_id else 0
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
        publication = self.coordinator.registry.find(publication_id)
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
        if self.coordinator.registry.find(publication_id) is not None:
            self.carry_out(self.coordinator.quarantine(publication_id, "test", self.now)[1])

    @rule(publication_id=publications)
    def evict(self, publication_id: str) -> None:
        if self.coordinator.registry.find(publication_id) is not None:
            self.evicted.add(publication_id)
            self.carry_out(self.coordinator.evict(publication_id, self.now)[1])

    @rule(
        instance_id=instances,
        key=st.sampled_from(KEYS),
        layout=st.sampled_from([*LAYOUTS, None]),
        if_absent=st.sampled_from(list(IfAbsent)),
        device=st.sampled_from(DEVICES),
    )
    def acquire(
        self,
        instance_id: str,
        key: WeightSetKey,
        layout: Layout | None,
        if_absent: IfAbsent,
        device: tuple[str, str],
    ) -> None:
        self.ask(instance_id, key, layout, if_absent, device)

    def ask(
        self,
        instance_id: str,
        key: WeightSetKey,
        layout: Layout | None,
        if_absent: IfAbsent,
        device: tuple[str, str] = DEVICES[0],
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
        )
        try:
            decisions = self.coordinator.acquire(acquisition, self.now)
        except BrokerError as error:
            self.check_refusal(error)
            return
        assert not self.coordinator.draining, "an acquisition was taken during a drain"
        self.asked.add(acquisition.acquisition_id)
        self.carry_out(decisions)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        acquisitions = list(self.coordinator.acquisitions)
        if acquisitions:
            acquisition_id = data.draw(st.sampled_from(acquisitions))
            self.abandoned.add(acquisition_id)
            self.carry_out(self.coordinator.abandon(acquisition_id, self.now))

    @rule(data=st.data(), cause=st.sampled_from([None, *FailureCause]))
    def end_transfer(self, data: st.DataObject, cause: FailureCause | None) -> None:
        running = list(self.coordinator.transfers.running.values())
        if not running:
            return
        self.end(data.draw(st.sampled_from(running)), cause)

    def end(self, transfer: Transfer, cause: FailureCause | None) -> None:
        receiver = transfer.receiver_instance_id
        if cause is None and transfer.is_brokers and not transfer.is_moved:
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

    @rule(data=st.data())
    def finish_moving(self, data: st.DataObject) -> None:
        if self.writing:
            transfer_id = data.draw(st.sampled_from(sorted(self.writing)))
            self.writing.discard(transfer_id)
            transfer = self.coordinator.transfers.running[transfer_id]
            self.carry_out(self.coordinator.transfer_moved(transfer_id, self.now))
            assert transfer.is_moved
            assert transfer_id not in transfer.publication.readers, "its source is not needed any more"
            assert self.coordinator.transfer_moved("transfer-0", self.now) == []

    @rule(data=st.data(), works=st.booleans())
    def finish_mapping(self, data: st.DataObject, works: bool) -> None:
        if self.mapping:
            publication = data.draw(st.sampled_from(self.mapping))
            self.mapping.remove(publication)
            if works:
                self.carry_out(self.coordinator.mapped(publication, self.now))
            else:
                self.carry_out(self.coordinator.mapping_failed(publication, self.now))

    @rule(publication_id=publications)
    def lose(self, publication_id: str) -> None:
        publication = self.coordinator.registry.find(publication_id)
        if publication is not None and TRAITS[publication.device_kind].broker_copies:
            self.carry_out(self.coordinator.lose(publication_id, "test", self.now))

    @rule(data=st.data())
    def give_up_load(self, data: st.DataObject) -> None:
        if self.loading:
            lease = data.draw(st.sampled_from(list(self.loading.values())))
            self.release(lease)

    # What the directory and the clock do

    @rule(data=st.data())
    def answer_claim(self, data: st.DataObject) -> None:
        if self.claims:
            claim = data.draw(st.sampled_from(self.claims))
            self.claims.remove(claim)
            answer = self.leases.claim(
                claim.weight_set_id,
                instance_id=claim.instance_id,
                instance_name="",
                host_id="host",
                now=self.now,
                seconds=LEASE_SECONDS,
            )
            self.carry_out(self.coordinator.lease_claimed(claim.weight_set_id, answer, self.now))

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
            self.carry_out(self.coordinator.lease_free(lease, self.now))
        self.carry_out(self.coordinator.advance(self.now))

    # Carrying decisions out, and checking each

    def check_refusal(self, error: BrokerError, otherwise: Reason | None = None) -> None:
        assert error.reason is (Reason.DRAINING if self.coordinator.draining else otherwise)

    def carry_out(self, decisions: Decisions) -> None:
        for decision in decisions:
            match decision:
                case decide.Grant(acquisition_id, transfer):
                    publication = transfer.publication
                    assert publication.state is PublicationState.RESIDENT
                    assert len(publication.readers) <= publication.reader_limit
                    assert acquisition_id not in self.answers
                    self.held.setdefault(publication.publication_id, set()).add(transfer.transfer_id)
                    if transfer.is_brokers:
                        assert (transfer.data_plane is DataPlane.LOCAL) == (
                            publication.device_id == self.coordinator.acquisitions[acquisition_id].device_id
                        )
                        self.writing.add(transfer.transfer_id)
                case decide.EndTransfer(transfer):
                    self.held[transfer.publication.publication_id].remove(transfer.transfer_id)
                    self.writing.discard(transfer.transfer_id)
                case decide.Unmap(publication):
                    readers = self.held.get(publication.publication_id, set())
                    if TRAITS[publication.device_kind].broker_copies:  # it may be freed now, so nothing may read it
                        assert not readers & self.writing, "device memory was given back while the broker read it"
                        continue
                    died = publication.instance_id not in self.coordinator.instances
                    forced = died or publication.publication_id in self.evicted
                    assert forced or not readers, "memory was given back while somebody read it"
                case decide.Map(publication) if TRAITS[publication.device_kind].broker_copies:
                    self.mapping.append(publication)
                case decide.Map(publication):
                    self.carry_out(self.coordinator.mapped(publication, self.now))
                case decide.ClaimLease():
                    self.claims.append(decision)
                case decide.ReleaseLease(lease):
                    self.release(lease)
                case decide.TellColdLoad(acquisition_id, lease):
                    assert lease.weight_set_id not in self.loading, "two instances were told to load"
                    self.loading[lease.weight_set_id] = lease
                    self.answer(acquisition_id, decision)
                case decide.Complete(acquisition_id) | decide.Fail(acquisition_id):
                    self.answer(acquisition_id, decision)

    def answer(self, acquisition_id: str, decision: decide.Decision) -> None:
        assert acquisition_id not in self.answers, "answered twice"
        assert acquisition_id not in self.abandoned, "answered after it was abandoned"
        self.answers[acquisition_id] = decision

    def release(self, lease: ColdLoadLease) -> None:
        self.forget_load(lease)
        if self.leases.release(lease):
            self.carry_out(self.coordinator.lease_free(lease, self.now))

    def forget_load(self, lease: ColdLoadLease) -> None:
        held = self.loading.get(lease.weight_set_id)
        if held is not None and held.fencing_token == lease.fencing_token:
            del self.loading[lease.weight_set_id]

    # Promises

    @invariant()
    def everybody_is_answered_or_known(self) -> None:
        assert self.asked == set(self.answers) | self.abandoned | set(self.coordinator.acquisitions)

    @invariant()
    def nobody_waits_while_a_source_is_free(self) -> None:
        for record in self.coordinator.weight_sets:
            for acquisition in record.waiting.values():
                for publication in self.coordinator.registry.of_weight_set(record.key.id):
                    assert (
                        publication.state is not PublicationState.RESIDENT
                        or len(publication.readers) == publication.reader_limit
                        or publication.publication_id in acquisition.failed_sources
                        or acquisition.layout not in (None, publication.layout)
                        or acquisition.device_kind != publication.device_kind
                    )

    @invariant()
    def whoever_waits_for_a_load_has_one_to_wait_for(self) -> None:
        for record in self.coordinator.weight_sets:
            loads = [one for one in record.waiting.values() if one.if_absent is IfAbsent.LOAD]
            busy = any(
                publication.device_kind in {one.device_kind for one in loads}
                and (
                    publication.state is PublicationState.REGISTERING
                    or (
                        publication.state is PublicationState.RESIDENT
                        and len(publication.readers) == publication.reader_limit
                    )
                )
                for publication in self.coordinator.registry.of_weight_set(record.key.id)
            )
            if loads and not busy:
                assert record.lease is not None or record.claim_pending is not None

    @invariant()
    def a_retraction_ends_with_its_last_reader(self) -> None:
        for publication in self.coordinator.registry:
            assert publication.state is not PublicationState.RETRACTING or publication.readers

    @invariant()
    def readers_are_the_running_transfers(self) -> None:
        for publication in self.coordinator.registry:
            running = {
                transfer.transfer_id
                for transfer in self.coordinator.transfers.running.values()
                if transfer.publication is publication and not transfer.is_moved
            }
            assert publication.readers == running

    def teardown(self) -> None:
        for _ in range(1000):
            if not self.coordinator.acquisitions:
                break
            for transfer in list(self.coordinator.transfers.running.values()):
                self.carry_out(
                    self.coordinator.transfer_failed(
                        transfer.transfer_id,
                        transfer.receiver_instance_id,
                        FailureCause.SOURCE_UNREACHABLE,
                        "",
                        self.now,
                    )
                )
            self.now += WAIT_SECONDS
            self.carry_out(self.coordinator.advance(self.now))
        assert not self.coordinator.acquisitions, "somebody was never answered"
        for instance_id in list(self.coordinator.instances):
            self.carry_out(self.coordinator.depart(instance_id, self.now))
        while self.claims:
            claim = self.claims.pop()
            answer = self.leases.claim(
                claim.weight_set_id,
                instance_id=claim.instance_id,
                instance_name="",
                host_id="host",
                now=self.now,
                seconds=LEASE_SECONDS,
            )
            self.carry_out(self.coordinator.lease_claimed(claim.weight_set_id, answer, self.now))
        for lease in self.leases.expire(self.now + 10 * LEASE_SECONDS):
            self.carry_out(self.coordinator.lease_free(lease, self.now))
        assert len(self.coordinator.registry) == 0
        assert list(self.coordinator.weight_sets) == [], "a weight set outlived everything that referred to it"


class DrainingCore(Core):
    """The same, with a drain at any moment."""

    @initialize(
        target=Core.publications,
        key=st.sampled_from(KEYS),
        layout=st.sampled_from(LAYOUTS),
        if_absent=st.sampled_from(list(IfAbsent)),
    )
    def somebody_reads(self, key: WeightSetKey, layout: Layout, if_absent: IfAbsent) -> object:
        """Running transfers are what a drain waits for."""
        publication_id = self.publish(self.new_instance(), key, layout, fulfils=False)
        self.ask(self.new_instance(), key, layout, if_absent)
        return publication_id

    @precondition(lambda self: not self.coordinator.draining)
    @rule(causes=st.lists(st.sampled_from([None, *FailureCause])))
    def drain(self, causes: list[FailureCause | None]) -> None:
        """Of the transfers that run some end next, the others whenever they like."""
        acquisitions = self.coordinator.acquisitions
        waiting = {one.acquisition_id for one in acquisitions.values() if not one.transfer_id}
        running, published = dict(self.coordinator.transfers.running), list(self.coordinator.registry)
        self.carry_out(self.coordinator.drain())
        for acquisition_id in waiting:
            answer = self.answers[acquisition_id]
            assert isinstance(answer, decide.Fail)
            assert answer.error.reason is Reason.DRAINING
        assert self.coordinator.transfers.running == running, "running transfers go on"
        assert list(self.coordinator.registry) == published, "and what is published stays"
        for transfer, cause in zip(running.values(), causes, strict=False):
            self.end(transfer, cause)

    @invariant()
    def nobody_waits_during_a_drain(self) -> None:
        if self.coordinator.draining:
            reading = {one.acquisition_id for one in self.coordinator.transfers.running.values()}
            assert set(self.coordinator.acquisitions) == reading
            assert self.coordinator.next_deadline() is None


TestCore = Core.TestCase
TestCore.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
TestDrainingCore = DrainingCore.TestCase
TestDrainingCore.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
