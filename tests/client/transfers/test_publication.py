"""A publication stays published across broker restarts, is the publisher's alone, and leaves nothing behind."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from support.scripted_broker import ScriptedBroker, refused
from support.scripted_stage import assert_set
from support.waiting import eventually
from weight_broker import (
    BrokerClient,
    BrokerUnavailable,
    InvalidArgument,
    NotAttached,
    PublicationNotFound,
    PublishRefused,
    Reason,
    RetractTimeout,
    WeightSetKey,
)
from weight_broker.connection import keeper
from weight_broker.memory.host.export import SharedWeights
from weight_broker.v1 import attach_pb2

KEY = WeightSetKey("model")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[ScriptedBroker]:
    scripted = ScriptedBroker(tmp_path).start()
    yield scripted
    scripted.stop()


@pytest.fixture
def client(broker: ScriptedBroker) -> Iterator[BrokerClient]:
    with BrokerClient(broker.directory) as created:
        yield created


def tensors() -> dict[str, object]:
    return {"a": np.arange(5000, dtype=np.float32), "b": np.zeros((0, 3), np.float16)}


def open_memfds() -> int:
    found = 0
    for entry in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{entry}").startswith("/memfd:weight-broker")
        except FileNotFoundError:
            continue
    return found


def keeper_runs() -> bool:
    return any(thread.name == "weight-broker-keeper" for thread in threading.enumerate())


def requests(broker: ScriptedBroker, count: int) -> list[str]:
    return [broker.attach_requests.get(timeout=60) for _ in range(count)]


def test_publishing_hands_the_memory_over_and_retracting_takes_it_back(
    broker: ScriptedBroker, client: BrokerClient
) -> None:
    publication = client.publish(KEY, tensors())
    assert (publication.id, publication.generation, publication.size_bytes) == ("publication-1", 1, 20000)
    assert requests(broker, 2) == ["hello", "offer_region"]
    request = broker.publish_requests.get(timeout=60)
    assert [spec.name for spec in request.layout.tensors] == ["a", "b"]
    assert len(request.placements) == 2
    assert len(request.regions) == 1
    assert len(request.digests) >= 1
    assert open_memfds() == 1
    publication.retract()
    publication.retract()
    assert requests(broker, 1) == ["withdraw_region"]
    assert broker.retractions.get(timeout=60) == "publication-1"
    assert broker.retractions.empty()
    assert publication.is_retracted
    assert open_memfds() == 0
    eventually(lambda: not keeper_runs())


def test_a_publication_is_retracted_at_the_end_of_its_block(broker: ScriptedBroker, client: BrokerClient) -> None:
    with client.publish(KEY, tensors()) as publication:
        assert broker.retractions.empty()
    assert broker.retractions.get(timeout=60) == publication.id


def test_a_refused_publication_leaves_nothing_behind(broker: ScriptedBroker, client: BrokerClient) -> None:
    broker.refusals["Publish"] = [Reason.LIMIT_EXCEEDED]
    with pytest.raises(PublishRefused):
        client.publish(KEY, tensors())
    assert requests(broker, 3) == ["hello", "offer_region", "withdraw_region"]
    assert open_memfds() == 0
    eventually(lambda: not keeper_runs())


def test_a_publication_whose_answer_was_lost_is_taken_back(broker: ScriptedBroker, client: BrokerClient) -> None:
    broker.refusals["Publish"] = [Reason.BROKER_UNAVAILABLE]
    with pytest.raises(BrokerUnavailable):
        client.publish(KEY, tensors())
    asked_again = broker.publish_requests.get(timeout=60)
    assert asked_again.request_id, "the same request, so that the broker answers with what became of it"
    assert broker.retractions.get(timeout=60) == "publication-1"
    assert open_memfds() == 0


def test_a_publication_whose_end_cannot_be_learned_ends_with_the_session(
    broker: ScriptedBroker, client: BrokerClient
) -> None:
    """Without its id it could not be retracted later. In the next session everything is published again."""
    kept = client.publish(KEY, tensors())
    assert requests(broker, 2) == ["hello", "offer_region"]
    broker.refusals["Publish"] = [Reason.BROKER_UNAVAILABLE] * 2
    another = client.publish(WeightSetKey("another"), tensors())
    assert requests(broker, 1) == ["offer_region"]
    while requests(broker, 1) != ["goodbye"]:
        """The next session may begin before the broker has read the last word of this one."""
    eventually(lambda: {kept.id, another.id} == {"publication-2", "publication-3"})
    assert set(broker.retractions.queue) <= {"publication-1"}, "a former session's, in case its broker still lives"


def test_a_repetition_that_is_refused_does_not_say_what_became_of_the_request_before(
    broker: ScriptedBroker, client: BrokerClient
) -> None:
    """Its stage connection had ended meanwhile, for example: the first request may have been carried out."""
    broker.refusals["Publish"] = [Reason.BROKER_UNAVAILABLE, NotAttached.without_stage()]
    client.publish(KEY, tensors())
    while requests(broker, 1) != ["goodbye"]:
        """Its region is offered before that."""


def test_a_publication_that_an_interruption_meets_is_taken_back(
    broker: ScriptedBroker, client: BrokerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(SharedWeights, "note", interrupt)
    with pytest.raises(KeyboardInterrupt):
        client.publish(KEY, tensors())
    assert broker.retractions.get(timeout=60) == "publication-2", "the broker's answer to the same request"
    assert open_memfds() == 0
    eventually(lambda: not keeper_runs())


def test_what_no_thread_can_keep_is_not_published(
    broker: ScriptedBroker, client: BrokerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(*arguments: object) -> NoReturn:
        raise RuntimeError("can't start new thread")

    client._attachment.session().stub  # noqa: B018 - opens the channel, which needs threads too
    with monkeypatch.context() as patched:
        patched.setattr(threading, "_start_new_thread", no_thread)
        with pytest.raises(BrokerUnavailable, match="can start no thread"):
            client.publish(KEY, tensors())
    assert broker.publish_requests.empty()
    assert open_memfds() == 0
    publication = client.publish(KEY, tensors())
    broker.drop_attachments()
    eventually(lambda: publication.id == "publication-2")


def test_publishing_has_one_deadline_for_all_of_its_steps(broker: ScriptedBroker, client: BrokerClient) -> None:
    """The regions are offered and taken back, and the session stays: it is the caller that has no time."""
    silence = threading.Event()
    broker.on_attach = lambda request: assert_set(silence) if request.WhichOneof("request") != "hello" else None
    client._attachment.session()
    try:
        with pytest.raises(BrokerUnavailable, match="within"):
            client.publish(KEY, tensors(), timeout=0.5)
    finally:
        silence.set()
    assert requests(broker, 3) == ["hello", "offer_region", "withdraw_region"]
    broker.on_attach = None
    client.publish(KEY, tensors())
    assert requests(broker, 1) == ["offer_region"]


def test_a_client_that_closes_warns_of_nothing(
    broker: ScriptedBroker, client: BrokerClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also if the keeper sees the end of the session first."""
    publication = client.publish(KEY, tensors())
    end, restored = client._attachment.end, threading.Event()

    def end_and_restore() -> None:
        end()
        publication.restore()
        restored.set()

    monkeypatch.setattr(client._attachment, "end", end_and_restore)
    client.close()
    assert restored.is_set()
    eventually(lambda: not keeper_runs())
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_refused_region_leaves_nothing_behind(broker: ScriptedBroker, client: BrokerClient) -> None:
    def refuse(request: attach_pb2.AttachRequest) -> attach_pb2.AttachResponse | None:
        return refused(Reason.REGION_REFUSED, "no") if request.WhichOneof("request") == "offer_region" else None

    broker.on_attach = refuse
    with pytest.raises(PublishRefused):
        client.publish(KEY, tensors())
    assert broker.publish_requests.empty()
    assert open_memfds() == 0


def test_what_is_no_tensor_is_refused_by_name(client: BrokerClient) -> None:
    with pytest.raises(InvalidArgument, match="wrong"):
        client.publish(KEY, {"wrong": object()})
    assert open_memfds() == 0


def test_while_readers_run_it_is_not_retracted_but_can_be_later(broker: ScriptedBroker, client: BrokerClient) -> None:
    publication = client.publish(KEY, tensors())
    broker.refusals["Retract"] = [Reason.RETRACT_TIMEOUT]
    with pytest.raises(RetractTimeout):
        publication.retract(timeout=0.1)
    assert not publication.is_retracted
    publication.retract()
    assert publication.is_retracted


def test_an_answer_to_a_retraction_that_was_lost_is_asked_for_again(
    broker: ScriptedBroker, client: BrokerClient
) -> None:
    publication = client.publish(KEY, tensors())
    broker.refusals["Retract"] = [Reason.BROKER_UNAVAILABLE]
    publication.retract()
    assert publication.is_retracted
    assert broker.retractions.get(timeout=60) == publication.id


def test_a_retraction_without_an_answer_is_none(broker: ScriptedBroker, client: BrokerClient) -> None:
    publication = client.publish(KEY, tensors())
    broker.refusals["Retract"] = [Reason.BROKER_UNAVAILABLE] * 2
    with pytest.raises(BrokerUnavailable):
        publication.retract()
    assert not publication.is_retracted
    publication.retract()
    assert publication.is_retracted


def test_what_the_broker_has_dropped_counts_as_retracted(broker: ScriptedBroker, client: BrokerClient) -> None:
    publication = client.publish(KEY, tensors())
    broker.refusals["Retract"] = [Reason.PUBLICATION_NOT_FOUND]
    publication.retract()
    assert publication.is_retracted
    assert open_memfds() == 0


def test_a_new_broker_has_the_same_memory_again_by_itself(
    broker: ScriptedBroker, client: BrokerClient, caplog: pytest.LogCaptureFixture
) -> None:
    publication = client.publish(KEY, tensors())
    first = broker.publish_requests.get(timeout=60)
    broker.stop()
    eventually(lambda: "cannot be published now" in caplog.text)
    successor = ScriptedBroker(broker.directory)
    successor._publication_number = 10
    successor.start()
    try:
        second = successor.publish_requests.get(timeout=60)
        eventually(lambda: publication.id == "publication-11")
        assert second.request_id != first.request_id
        assert second.fencing_token == 0
        assert (second.layout, second.digests, second.placements) == (first.layout, first.digests, first.placements)
        assert requests(successor, 2) == ["hello", "offer_region"]
        publication.retract()
        retracted = [successor.retractions.get(timeout=60) for _ in range(2)]
        assert retracted == ["publication-1", "publication-11"], "the former one in case its broker still lives"
    finally:
        client.close()
        successor.stop()
        broker._listener = successor._listener  # the fixture stops what runs
        broker.stop = lambda: None  # type: ignore[method-assign]


def test_while_there_is_no_broker_it_is_looked_for_a_few_times_a_second(
    broker: ScriptedBroker, client: BrokerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.publish(KEY, tensors())
    events: list[float | str] = []
    enough = threading.Event()

    def connect(path: Path, deadline: float) -> None:
        events.append("attempt")
        raise BrokerUnavailable("gone")

    def sleep(bell: int, sockets: Iterable[int], seconds: float | None) -> None:
        if seconds is not None:  # otherwise nothing is broken yet
            events.append(seconds)
            if len(events) < 8:
                return
            enough.set()
        real_sleep(bell, sockets, seconds)

    real_sleep = keeper._sleep
    monkeypatch.setattr("weight_broker.connection.attach._connect", connect)
    monkeypatch.setattr(keeper, "_sleep", sleep)
    broker.drop_attachments()
    assert enough.wait(60)
    assert events[:8:2] == ["attempt"] * 4
    assert events[1:8:2] == pytest.approx([0.2, 0.3, 0.45, 0.675])


def test_retracting_while_the_broker_is_gone_succeeds_and_is_final(
    broker: ScriptedBroker, client: BrokerClient
) -> None:
    publication = client.publish(KEY, tensors())
    broker.publish_requests.get(timeout=60)
    broker.drop_attachments()
    publication.retract()
    assert publication.is_retracted
    eventually(lambda: not keeper_runs())
    assert open_memfds() == 0


def test_closing_the_client_says_goodbye_and_frees_everything(broker: ScriptedBroker, client: BrokerClient) -> None:
    publications = [client.publish(KEY, tensors()) for _ in range(3)]
    client.close()
    client.close()
    assert requests(broker, 5) == ["hello", "offer_region", "offer_region", "offer_region", "goodbye"]
    assert all(publication.is_retracted for publication in publications)
    assert open_memfds() == 0
    eventually(lambda: not keeper_runs())
    publications[0].retract()
    assert broker.retractions.empty()


def test_an_unused_client_that_is_dropped_leaves_the_broker(broker: ScriptedBroker) -> None:
    client = BrokerClient(broker.directory)
    client._attachment.session()
    del client
    assert requests(broker, 2) == ["hello", "goodbye"]


def test_a_publication_outlives_the_last_reference_to_its_client(broker: ScriptedBroker) -> None:
    publication = BrokerClient(broker.directory).publish(KEY, tensors())
    gc.collect()
    publication.retract()
    assert requests(broker, 3) == ["hello", "offer_region", "withdraw_region"], "there was no goodbye before"


def test_a_forked_child_can_neither_retract_nor_end_what_is_the_parents(
    broker: ScriptedBroker, client: BrokerClient
) -> None:
    publication = client.publish(KEY, tensors())
    assert requests(broker, 2) == ["hello", "offer_region"]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            assert open_memfds() == 0
            assert publication.is_retracted
            with pytest.raises(PublicationNotFound, match="only that process"):
                publication.retract()
            with publication:
                pass
            client.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert not publication.is_retracted
    publication.retract()
    assert broker.retractions.get(timeout=60) == publication.id
    assert broker.retractions.empty()
    assert requests(broker, 1) == ["withdraw_region"], "nor was there a goodbye before"
