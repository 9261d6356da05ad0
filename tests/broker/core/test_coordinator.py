"""What the coordinator decides in the cases that operators ask about."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import pytest

from support.local_core import LocalCoordinator as Coordinator
from weight_broker.errors import (
    AcquireTimeout,
    BrokerError,
    IntegrityError,
    LayoutMismatch,
    LeaseLost,
    NotAttached,
    Reason,
    WeightsNotFound,
)
from weight_broker.key import WeightSetKey
from weight_broker.layout import Layout, TensorSpec
from weight_brokerd.core import decisions as decide
from weight_brokerd.core import publications, selection
from weight_brokerd.core.answers import Outcome, Question
from weight_brokerd.core.model import (
    Acquisition,
    Arrival,
    DataPlane,
    FailureCause,
    IfAbsent,
    Instance,
    Limits,
    TransferPath,
    WaitReason,
)
from weight_brokerd.core.publications import Offer, Publication
from weight_brokerd.core.sources import Holder
from weight_brokerd.directory.lease_table import LeaseTable

Kind = TypeVar("Kind")
KEY = WeightSetKey("model", revision="1")
LAYOUT = Layout([TensorSpec("weight", "bfloat16", (4,), (1,), 8)])
OTHER_LAYOUT = Layout([TensorSpec("weight", "float16", (4,), (1,), 8)])


@pytest.fixture
def coordinator() -> Coordinator:
    made = Coordinator(host_id="host", limits=Limits(readers_per_publication=1))
    for name in ("a", "b", "c"):
        made.attach(Instance(name, f"name-{name}", 1, 0, 0, 0.0))
    return made


def publish(coordinator: Coordinator, instance_id: str = "a", *, layout: Layout = LAYOUT) -> Publication:
    offer = Offer(KEY, layout, instance_id, "cpu", "", 0, f"request-{instance_id}")
    publication, _ = coordinator.publish(offer, 0.0)
    coordinator.held(publication, 0.0)
    return publication


def acquisition(name: str, instance_id: str = "b", if_absent: IfAbsent = IfAbsent.LOAD) -> Acquisition:
    return Acquisition(
        acquisition_id=name,
        key=KEY,
        layout=LAYOUT,
        instance_id=instance_id,
        if_absent=if_absent,
        device_kind="cpu",
        device_id="",
        path=TransferPath.COPY,
        begun_at=0.0,
        deadline=100.0,
    )


def only(kind: type[Kind], decisions: list[decide.Decision]) -> Kind:
    found = [decision for decision in decisions if isinstance(decision, kind)]
    assert len(found) == 1, decisions
    return found[0]


def failure(decisions: list[decide.Decision]) -> BrokerError:
    return only(decide.Fail, decisions).error


def test_a_resident_weight_set_is_granted(coordinator: Coordinator) -> None:
    publication = publish(coordinator)
    grant = only(decide.Grant, coordinator.acquire(acquisition("one"), 1.0))
    assert grant.transfer.publication is publication


def test_a_transfer_says_what_moves_it_and_a_receiver_that_was_told_otherwise_is_told_again(
    coordinator: Coordinator,
) -> None:
    publish(coordinator)
    transfer = only(decide.Grant, coordinator.acquire(acquisition("one"), 1.0)).transfer
    seen = [transfer.data_plane]
    assert coordinator.routed(transfer.transfer_id, DataPlane.LOCAL) == []
    assert only(decide.Grant, coordinator.routed(transfer.transfer_id, DataPlane.DATASYSTEM)).transfer is transfer
    seen.append(transfer.data_plane)
    coordinator.transfer_succeeded(transfer.transfer_id, "b", Arrival(8, (), "full"), 2.0)
    assert coordinator.transfers.succeeded == {DataPlane.DATASYSTEM: 1}
    assert coordinator.routed(transfer.transfer_id, DataPlane.LOCAL) == []
    assert [*seen, transfer.data_plane] == [DataPlane.LOCAL, DataPlane.DATASYSTEM, DataPlane.DATASYSTEM]


def on_a_card(name: str, *, takes_host_memory: bool = True) -> Acquisition:
    kinds = frozenset({"cpu"}) if takes_host_memory else frozenset[str]()
    asked = acquisition(name)
    return replace(asked, device_kind="npu", device_id="npu:0", path=TransferPath.STAGED, other_kinds=kinds)


def test_a_card_is_filled_from_host_memory_by_its_own_process(coordinator: Coordinator) -> None:
    publication = publish(coordinator)
    decisions = coordinator.acquire(on_a_card("one"), 1.0)
    transfer = only(decide.Reserve, decisions).transfer
    assert (transfer.publication, transfer.broker_copies, transfer.path) == (publication, False, TransferPath.COPY)


def test_a_card_is_filled_from_host_memory_only_if_it_says_so(coordinator: Coordinator) -> None:
    publish(coordinator)
    only(decide.ClaimLease, coordinator.acquire(on_a_card("one", takes_host_memory=False), 1.0))


def test_a_card_is_rather_filled_from_a_card(coordinator: Coordinator) -> None:
    publish(coordinator)
    offer = Offer(KEY, LAYOUT, "a", "npu", "npu:1", 0, "request-of-a-card")
    from_a_card, _ = coordinator.publish(offer, 0.0)
    coordinator.held(from_a_card, 0.0)
    said = coordinator.explain(Question(KEY.id, None, LAYOUT, "npu", "npu:0", frozenset({"cpu"})))
    assert said.selection.chosen is from_a_card
    assert only(decide.Reserve, coordinator.acquire(on_a_card("one"), 1.0)).transfer.publication is from_a_card


@pytest.mark.parametrize("if_absent", [IfAbsent.FAIL, IfAbsent.WAIT])
def test_a_miss_is_told_at_once_to_those_who_will_not_load(coordinator: Coordinator, if_absent: IfAbsent) -> None:
    assert isinstance(failure(coordinator.acquire(acquisition("one", if_absent=if_absent), 1.0)), WeightsNotFound)


def test_a_busy_source_is_waited_for_in_order(coordinator: Coordinator) -> None:
    publish(coordinator)
    first = only(decide.Grant, coordinator.acquire(acquisition("one"), 1.0)).transfer
    assert only(decide.Wait, coordinator.acquire(acquisition("two"), 1.0)).acquisition_id == "two"
    coordinator.acquire(acquisition("three", "c"), 1.0)
    done = coordinator.transfer_succeeded(first.transfer_id, "b", Arrival(8, (), "full"), 2.0)
    assert only(decide.Grant, done).acquisition_id == "two"


def registering(coordinator: Coordinator) -> Publication:
    """As after a restart of the broker: nobody has a lease for it."""
    return coordinator.publish(Offer(KEY, LAYOUT, "a", "cpu", "", 0, "request-a"), 0.0)[0]


@pytest.mark.parametrize("if_absent", [IfAbsent.WAIT, IfAbsent.LOAD])
def test_a_source_that_is_being_mapped_is_waited_for(coordinator: Coordinator, if_absent: IfAbsent) -> None:
    publication = registering(coordinator)
    waiting = only(decide.Wait, coordinator.acquire(acquisition("one", if_absent=if_absent), 1.0))
    assert waiting.reason is WaitReason.REGISTERING
    assert only(decide.Grant, coordinator.held(publication, 2.0)).transfer.publication is publication


def test_a_source_that_is_being_mapped_is_none_yet_for_those_who_will_not_wait(coordinator: Coordinator) -> None:
    registering(coordinator)
    refused = failure(coordinator.acquire(acquisition("one", if_absent=IfAbsent.FAIL), 1.0))
    assert isinstance(refused, WeightsNotFound)


def test_a_source_of_another_layout_that_is_being_mapped_is_not_waited_for(coordinator: Coordinator) -> None:
    coordinator.publish(Offer(KEY, OTHER_LAYOUT, "a", "cpu", "", 0, "request-a"), 0.0)
    only(decide.ClaimLease, coordinator.acquire(acquisition("one"), 1.0))


@pytest.mark.parametrize("end", ["fails", "depart", "evict", "lose", "retract"])
def test_who_waits_for_a_source_that_is_never_mapped_is_told_to_load(coordinator: Coordinator, end: str) -> None:
    publication = registering(coordinator)
    only(decide.Wait, coordinator.acquire(acquisition("one"), 1.0))
    match end:
        case "fails":
            decisions = coordinator.not_held(publication, 2.0)
        case "depart":
            decisions = coordinator.depart("a", 2.0)
        case "evict":
            decisions = coordinator.evict(publication.publication_id, 2.0)[1]
        case "lose":
            decisions = coordinator.lose(publication.publication_id, "test", 2.0)
        case _:
            decisions = coordinator.retract("a", publication.publication_id, 2.0)[1]
    assert only(decide.ClaimLease, decisions).instance_id == "b"


@pytest.mark.parametrize("end", ["depart", "evict", "quarantine", "retract"])
def test_who_waits_for_a_slot_is_told_at_once_that_the_source_is_none_any_more(
    coordinator: Coordinator, end: str
) -> None:
    publication = publish(coordinator)
    coordinator.acquire(acquisition("one"), 1.0)
    only(decide.Wait, coordinator.acquire(acquisition("two", "c"), 1.0))
    match end:
        case "depart":
            decisions = coordinator.depart("a", 2.0)
        case "evict":
            decisions = coordinator.evict(publication.publication_id, 2.0)[1]
        case "quarantine":
            decisions = coordinator.quarantine(publication.publication_id, "test", 2.0)[1]
        case _:
            decisions = coordinator.retract("a", publication.publication_id, 2.0)[1]
    assert only(decide.ClaimLease, decisions).instance_id == "c"


def test_another_layout_is_refused_naming_the_difference(coordinator: Coordinator) -> None:
    publish(coordinator, layout=OTHER_LAYOUT)
    error = failure(coordinator.acquire(acquisition("one"), 1.0))
    assert isinstance(error, LayoutMismatch)
    assert error.metadata["differences"] == "weight.dtype: resident float16, wanted bfloat16"


def test_what_differs_is_looked_for_once_whatever_the_number_of_sources(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        publish(coordinator, name, layout=OTHER_LAYOUT)
    compared: list[Layout] = []

    def count(_resident: Layout, wanted: Layout) -> list[str]:
        compared.append(wanted)
        return ["something"]

    monkeypatch.setattr(publications, "differences", count)
    error = failure(coordinator.acquire(acquisition("one"), 1.0))
    assert (error.metadata["differences"], len(compared)) == ("something", 1)


def test_after_wrong_bytes_the_next_source_is_tried(coordinator: Coordinator) -> None:
    bad, good = publish(coordinator, "a"), publish(coordinator, "c")
    first = only(decide.Grant, coordinator.acquire(acquisition("one", if_absent=IfAbsent.WAIT), 1.0)).transfer
    assert first.publication is bad
    again = coordinator.transfer_failed(first.transfer_id, "b", FailureCause.DIGEST_MISMATCH, "weight", 2.0)
    second = only(decide.Grant, again).transfer
    assert second.publication is good
    last = coordinator.transfer_failed(second.transfer_id, "b", FailureCause.DIGEST_MISMATCH, "weight", 3.0)
    assert isinstance(failure(last), IntegrityError)


def test_the_lease_holder_is_told_to_load_and_its_publication_serves_the_others(coordinator: Coordinator) -> None:
    table = LeaseTable()
    claim = only(decide.ClaimLease, coordinator.acquire(acquisition("one"), 1.0))
    coordinator.acquire(acquisition("two", "c"), 1.0)
    answer = table.claim(claim.weight_set_id, Holder("host", "b"), now=1.0, seconds=60.0)
    told = coordinator.lease_claimed(claim.weight_set_id, answer, 1.0)
    assert only(decide.LoadFromDisk, told).acquisition_id == "one"
    assert only(decide.Wait, told).acquisition_id == "two"
    offer = Offer(KEY, LAYOUT, "b", "cpu", "", answer.lease.fencing_token, "request")
    publication, _ = coordinator.publish(offer, 2.0)
    mapped = coordinator.held(publication, 2.0)
    assert only(decide.Grant, mapped).acquisition_id == "two"
    assert only(decide.ReleaseLease, mapped).lease == answer.lease


def test_where_the_directory_does_not_answer_each_waiter_is_sent_to_the_disk_in_turn(coordinator: Coordinator) -> None:
    claim = only(decide.ClaimLease, coordinator.acquire(acquisition("one"), 1.0))
    coordinator.acquire(acquisition("two", "c"), 1.0)
    failed = coordinator.claim_failed(claim.weight_set_id, "no answer", 2.0)
    assert (only(decide.Fail, failed).acquisition_id, failure(failed).reason) == ("one", Reason.BROKER_UNAVAILABLE)
    assert only(decide.ClaimLease, failed).instance_id == "c"
    assert only(decide.Fail, coordinator.claim_failed(claim.weight_set_id, "", 3.0)).acquisition_id == "two"
    assert not list(coordinator.weight_sets)


def test_a_lease_is_reported_on_by_its_holder_only(coordinator: Coordinator) -> None:
    claim = only(decide.ClaimLease, coordinator.acquire(acquisition("one"), 1.0))
    answer = LeaseTable(5).claim(claim.weight_set_id, Holder("host", "b"), now=1.0, seconds=60.0)
    coordinator.lease_claimed(claim.weight_set_id, answer, 1.0)
    assert coordinator.weight_sets.lease_held_by(Holder("host", "b"), KEY.id, 5) == answer.lease
    for instance_id, token in (("c", 5), ("b", 4), ("b", 6)):
        with pytest.raises(LeaseLost):
            coordinator.weight_sets.lease_held_by(Holder("host", instance_id), KEY.id, token)


def test_an_extended_lease_does_not_expire_at_its_first_end() -> None:
    table = LeaseTable()
    lease = table.claim("w", Holder("host", "a"), now=0.0, seconds=10.0).lease
    longer = table.extend(lease, 25.0)
    assert table.expire(20.0) == []
    assert table.expire(30.0) == [longer]
    with pytest.raises(LeaseLost):
        table.extend(longer, 40.0)


def test_a_request_id_cannot_be_used_for_two_publications(coordinator: Coordinator) -> None:
    publish(coordinator)
    offer = Offer(replace(KEY, revision="2"), LAYOUT, "a", "cpu", "", 0, "request-a")
    with pytest.raises(BrokerError) as refused:
        coordinator.publish(offer, 1.0)
    assert refused.value.reason is Reason.INVALID_ARGUMENT


def test_a_drain_answers_who_waits_and_lets_transfers_run(coordinator: Coordinator) -> None:
    publish(coordinator)
    running = only(decide.Grant, coordinator.acquire(acquisition("one"), 1.0)).transfer
    coordinator.acquire(acquisition("two", "c"), 1.0)
    assert failure(coordinator.drain(0.0)).reason is Reason.DRAINING
    with pytest.raises(BrokerError, match="draining"):
        coordinator.acquire(acquisition("three"), 2.0)
    done = coordinator.transfer_succeeded(running.transfer_id, "b", Arrival(8, (), "full"), 2.0)
    assert only(decide.Complete, done).acquisition_id == "one"


def test_whose_source_fails_during_a_drain_is_not_told_to_load(coordinator: Coordinator) -> None:
    publish(coordinator)
    running = only(decide.Grant, coordinator.acquire(acquisition("one"), 1.0)).transfer
    coordinator.drain(0.0)
    failed = coordinator.transfer_failed(running.transfer_id, "b", FailureCause.SOURCE_UNREACHABLE, "", 2.0)
    assert failure(failed).reason is Reason.DRAINING


def test_a_waiting_acquisition_is_answered_at_its_deadline(coordinator: Coordinator) -> None:
    coordinator.acquire(acquisition("one"), 1.0)
    assert coordinator.next_deadline() == 100.0
    assert isinstance(failure(coordinator.advance(100.0)), AcquireTimeout)
    assert coordinator.next_deadline() is None


def test_explain_names_the_fields_of_a_near_miss(coordinator: Coordinator) -> None:
    publish(coordinator)
    wanted = replace(KEY, revision="2", dtype="float16")
    explanation = coordinator.explain(Question(wanted.id, wanted, layout=None))
    assert explanation.outcome is Outcome.COLD_LOAD
    assert explanation.near_misses[0].weight_set_id == KEY.id
    assert explanation.near_misses[0].differing_fields == ("revision", "dtype")


def test_explain_tells_what_an_acquisition_then_gets(coordinator: Coordinator) -> None:
    def outcome() -> Outcome:
        return coordinator.explain(Question(KEY.id, None, LAYOUT)).outcome

    assert outcome() is Outcome.COLD_LOAD
    publication = publish(coordinator)
    assert outcome() is Outcome.TRANSFER
    coordinator.acquire(acquisition("one"), 1.0)
    assert outcome() is Outcome.WAIT_FOR_SOURCE
    coordinator.abandon("one", 2.0)
    coordinator.quarantine(publication.publication_id, "test", 2.0)
    assert outcome() is Outcome.COLD_LOAD
    coordinator.drain(0.0)
    assert outcome() is Outcome.DRAINING


def test_explain_waits_for_a_source_that_is_being_mapped_as_acquire_does(coordinator: Coordinator) -> None:
    registering(coordinator)
    assert coordinator.explain(Question(KEY.id, None, LAYOUT)).outcome is Outcome.WAIT_FOR_SOURCE


def test_explain_takes_the_kind_of_memory_in_which_the_weight_set_is_published(coordinator: Coordinator) -> None:
    publication, _ = coordinator.publish(Offer(KEY, LAYOUT, "a", "npu", "npu:0", 0, "request-a"), 0.0)
    coordinator.held(publication, 0.0)
    assert coordinator.explain(Question(KEY.id, None, LAYOUT)).outcome is Outcome.TRANSFER
    assert coordinator.explain(Question(KEY.id, None, LAYOUT, "cpu")).outcome is Outcome.COLD_LOAD


def test_waiters_that_are_alike_are_judged_once(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(coordinator)
    coordinator.acquire(acquisition("reads"), 1.0)
    for number in range(100):
        coordinator.acquire(acquisition(f"waits-{number}", "c"), 1.0)
    judged: list[object] = []
    judge = selection._judge

    def count(source: Publication, receiver: selection.Receiver) -> selection.Candidate[Publication]:
        judged.append(source)
        return judge(source, receiver)

    monkeypatch.setattr(selection, "_judge", count)
    publish(coordinator, "b")
    assert len(judged) == 2 * 2, "both sources, once for the free slot and once for all who go on waiting"


def test_the_next_deadline_is_that_of_the_acquisitions_that_wait(coordinator: Coordinator) -> None:
    publish(coordinator)
    early = acquisition("one")
    early.deadline = 10.0
    granted = only(decide.Grant, coordinator.acquire(early, 1.0))
    coordinator.acquire(acquisition("two", "c"), 1.0)
    assert coordinator.next_deadline() == 100.0
    coordinator.transfer_failed(granted.transfer.transfer_id, "b", FailureCause.SOURCE_UNREACHABLE, "", 2.0)
    assert coordinator.next_deadline() == 10.0
    assert only(decide.Fail, coordinator.advance(10.0)).acquisition_id == "one"


def test_an_instance_of_another_host_keeps_its_lease_when_one_of_the_same_name_departs(
    coordinator: Coordinator,
) -> None:
    claim = only(decide.ClaimLease, coordinator.acquire(acquisition("one", "c"), 1.0))
    elsewhere = LeaseTable().claim(claim.weight_set_id, Holder("another host", "b"), now=1.0, seconds=60.0)
    coordinator.lease_claimed(claim.weight_set_id, replace(elsewhere, granted=False), 1.0)
    assert not [one for one in coordinator.depart("b", 2.0) if isinstance(one, decide.ReleaseLease)]


def test_an_instance_that_departs_during_its_call_is_not_attached_any_more(coordinator: Coordinator) -> None:
    """Its call was identified before that: a request may be checked for seconds."""
    coordinator.depart("b", 1.0)
    with pytest.raises(NotAttached, match="b has departed"):
        publish(coordinator, "b")
    with pytest.raises(NotAttached, match="b has departed"):
        coordinator.acquire(acquisition("one", "b"), 1.0)
    assert not len(coordinator.acquisitions)
    assert not list(coordinator.weight_sets)
