"""The layouts of publications and running acquisitions have bounded room, which comes back with their end."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest

from support.local_core import LocalCoordinator
from weight_broker.errors import BrokerError, NotAttached, PublishRefused, Reason
from weight_broker.key import WeightSetKey
from weight_broker.layout import Layout, TensorSpec
from weight_brokerd.core.model import Acquisition, Arrival, FailureCause, IfAbsent, Instance, Limits, TransferPath
from weight_brokerd.core.publications import Offer, Publication

PER_PROCESS = 10
NOW = 1.0


def layout(tensors: int) -> Layout:
    return Layout([TensorSpec(f"layers.{number}.weight", "int8", (8,), (1,), 8) for number in range(tensors)])


class Host:
    """A core with three processes: `a` and `b` of one user, `c` of another."""

    def __init__(self, *, total: int = 1000) -> None:
        limits = Limits(layout_tensors=total, layout_tensors_per_process=PER_PROCESS)
        self.core = LocalCoordinator(host_id="host", limits=limits)
        for number, (name, uid) in enumerate({"a": 1, "b": 1, "c": 2}.items(), 100):
            self.core.attach(Instance(name, name, number, uid, uid, 0.0))
        self.requests = 0

    @property
    def room(self) -> int:
        """Tensors that are held."""
        return len(self.core.layout_room)

    def publish(self, instance_id: str, tensors: int, model: str = "model") -> Publication:
        self.requests += 1
        offer = Offer(WeightSetKey(model), layout(tensors), instance_id, "cpu", "", 0, f"request-{self.requests}")
        publication, _ = self.core.publish(offer, NOW)
        self.core.held(publication, NOW)
        return publication

    def acquire(self, instance_id: str, tensors: int | None, model: str = "model") -> str:
        self.requests += 1
        name = f"acquisition-{self.requests}"
        wanted = layout(tensors) if tensors is not None else None
        path = TransferPath.COPY if tensors is not None else TransferPath.ZERO_COPY
        key = WeightSetKey(model)
        self.core.acquire(
            Acquisition(name, key, wanted, instance_id, IfAbsent.LOAD, "cpu", "", path, NOW, NOW + 60), NOW
        )
        return name

    def transfer_of(self, acquisition_id: str) -> str:
        return self.core.acquisitions[acquisition_id].transfer_id


def refusal_of(action: Callable[[], object]) -> BrokerError:
    with pytest.raises(PublishRefused) as refused:
        action()
    assert refused.value.reason is Reason.LIMIT_EXCEEDED
    return refused.value


def test_what_a_process_publishes_and_acquires_counts_together_and_the_refusal_says_what_to_do() -> None:
    host = Host()
    publication = host.publish("a", 6)
    host.acquire("a", 4, model="another")
    for too_much in (lambda: host.publish("a", 1, model="third"), lambda: host.acquire("a", 1, model="third")):
        error = refusal_of(too_much)
        limit = "limits.layout_tensors_per_process"
        assert (error.metadata["limit"], error.metadata["value"]) == (limit, str(PER_PROCESS))
        assert "retract publications, or end acquisitions, or raise it" in error.message
    assert list(host.core.publications) == [publication], "nothing else has changed"
    assert (len(host.core.acquisitions), host.room) == (1, 10)
    assert [record.key.model for record in host.core.weight_sets] == ["model", "another"]
    host.publish("b", PER_PROCESS)


def test_a_layout_that_is_larger_than_what_is_left_is_refused_by_how_much_it_is_too_large() -> None:
    host = Host()
    host.publish("a", 6)
    error = refusal_of(lambda: host.publish("a", 5, model="another"))
    assert "has 6 tensors in layouts, and 5 more would be above what" in error.message
    host.publish("a", 4, model="another")


def test_a_user_leaves_a_quarter_of_the_room_to_others() -> None:
    host = Host(total=16)
    host.publish("a", PER_PROCESS)
    error = refusal_of(lambda: host.publish("b", 3))
    assert (error.metadata["limit"], error.metadata["value"]) == ("limits.layout_tensors", "12")
    host.publish("c", 6)


def test_every_holder_of_a_layout_counts() -> None:
    host = Host()
    host.publish("a", 4)
    host.publish("a", 4, model="another")
    host.publish("b", 4)
    assert host.room == 12


def test_a_receiver_that_takes_any_layout_needs_no_room() -> None:
    host = Host()
    host.publish("a", PER_PROCESS)
    host.acquire("a", None)
    assert host.room == PER_PROCESS


@pytest.mark.parametrize("end", ["retract", "evict", "not held", "death"])
def test_the_room_of_a_publication_comes_back_with_its_end(end: str) -> None:
    host = Host()
    publication = host.publish("a", PER_PROCESS)
    publication_id = publication.publication_id
    match end:
        case "retract":
            host.core.retract("a", publication_id, NOW)
        case "evict":
            host.core.evict(publication_id, NOW)
        case "not held":
            host.core.evict(publication_id, NOW)
            offer = Offer(WeightSetKey("model"), layout(PER_PROCESS), "a", "cpu", "", 0, "again")
            registering, _ = host.core.publish(offer, NOW)
            host.core.not_held(registering, NOW)
        case "death":
            host.core.depart("a", NOW)
    assert host.room == 0


def test_the_room_of_a_source_is_kept_until_its_last_reader_has_ended() -> None:
    host = Host()
    host.publish("a", PER_PROCESS)
    reading = host.transfer_of(host.acquire("b", None))
    host.core.depart("a", NOW)
    assert host.room == PER_PROCESS, "the transfer reads on"
    host.core.transfer_succeeded(reading, "b", Arrival(8, (), "full"), NOW)
    assert host.room == 0


@pytest.mark.parametrize("end", ["succeeded", "failed", "deadline", "abandoned", "death"])
def test_the_room_of_an_acquisition_comes_back_with_its_end(end: str) -> None:
    host = Host()
    if end in ("succeeded", "failed"):
        host.publish("a", 3)
    acquisition_id = host.acquire("b", 3)
    others = host.room - 3
    match end:
        case "succeeded":
            host.core.transfer_succeeded(host.transfer_of(acquisition_id), "b", Arrival(8, (), "full"), NOW)
        case "failed":
            transfer_id = host.transfer_of(acquisition_id)
            host.core.transfer_failed(transfer_id, "b", FailureCause.RECEIVER, "test", NOW)
        case "deadline":
            host.core.advance(NOW + 61)
        case "abandoned":
            host.core.abandon(acquisition_id, NOW)
        case "death":
            host.core.depart("b", NOW)
    assert host.room == others


def test_what_is_remembered_of_a_transfer_does_not_keep_its_layout() -> None:
    host = Host()
    publication = host.publish("a", 3)
    reference = weakref.ref(publication.layout)
    fingerprint = publication.fingerprint
    transfer_id = host.transfer_of(host.acquire("b", None))
    host.core.transfer_succeeded(transfer_id, "b", Arrival(24, (), "full"), NOW)
    host.core.retract("a", publication.publication_id, NOW)
    del publication
    gc.collect()
    assert reference() is None
    [record] = host.core.transfers.newest_first()
    assert (record.transfer_id, record.fingerprint, record.size_bytes) == (transfer_id, fingerprint, 24)


def test_an_instance_that_departed_while_its_request_was_checked_is_not_attached() -> None:
    host = Host()
    host.core.depart("a", NOW)
    with pytest.raises(NotAttached):
        host.publish("a", 1)
    with pytest.raises(NotAttached):
        host.acquire("a", 1)
    assert host.room == 0
