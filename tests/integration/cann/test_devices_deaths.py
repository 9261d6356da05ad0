"""kill -9 of anything while weights move between cards: bounded, told apart, nothing left, and the next one works."""

from __future__ import annotations

import os
import signal
import time
from functools import partial

import pytest

from doubles.cann.control import CannHost, Fault, card_name, is_alive
from support import device_instance as instance
from support.card_process import CardProcess
from support.datasystem_worker import DatasystemWorker, free_ports
from support.device_host import DeviceHost, cards, published_on, wait_until_idle
from support.device_scene import MODEL, SLOW, Scene
from support.waiting import eventually
from weight_broker.v1 import resources_pb2

MIB = 1 << 20
ENGINE_WAITS = 60.0
"""Seconds that the engine makes a reader wait for a source that is gone."""

pytestmark = pytest.mark.timeout(120)


def is_filled(process: CardProcess) -> bool:
    return process.call(instance.acquire, "model").error == ""


@pytest.fixture
def scene(device_host: DeviceHost) -> Scene:
    return Scene(device_host)


def test_a_publisher_killed_while_it_is_read_costs_a_failover(scene: Scene) -> None:
    first, receiver = scene.publisher("first", 0), scene.receiver("receiver", 1)
    scene.warm_up(receiver)
    second = scene.publisher("second", 2)
    scene.cann.inject(Fault.SLOW_LINK, card=1, value=SLOW)
    acquiring = receiver.begin(instance.acquire, "model")
    scene.wait_until_moving(1)
    first.kill()
    scene.cann.clear()
    outcome = acquiring(50)
    assert (outcome.error, outcome.source) == ("", "second")
    assert receiver.call(instance.digest, "model") == second.call(instance.digest, "model")
    assert published_on(scene.broker) == [("second", card_name(2))]
    assert second.call(instance.retract, "model").error == ""
    wait_until_idle(scene.broker)


def test_the_only_publisher_killed_while_it_is_read_is_a_failure_and_the_next_publication_is_read_at_once(
    scene: Scene,
) -> None:
    """H2: the engine would poison the key and make the next reader wait for a minute."""
    first, receiver = scene.publisher("first", 0), scene.receiver("receiver", 1)
    scene.warm_up(receiver)
    scene.cann.inject(Fault.SLOW_LINK, card=1, value=SLOW)
    acquiring = receiver.begin(instance.acquire, "model")
    scene.wait_until_moving(1)
    first.kill()
    outcome = acquiring(ENGINE_WAITS - 10)
    assert (outcome.error, outcome.touched, outcome.quiesced) == ("TransferFailed", True, True)
    scene.cann.clear()
    again = scene.publisher("again", 0)
    assert receiver.call(instance.acquire, "model", timeout=ENGINE_WAITS - 10).source == "again"
    assert receiver.call(instance.digest, "model") == again.call(instance.digest, "model")


def test_who_lost_its_only_source_is_told_to_load_once_nobody_writes(scene: Scene) -> None:
    first, receiver = scene.publisher("first", 0), scene.receiver("receiver", 1)
    scene.warm_up(receiver)
    (writer,) = cards(scene.broker)[card_name(1)].receiver_pids
    scene.cann.inject(Fault.SLOW_LINK, card=1, value=SLOW)
    acquiring = receiver.begin(instance.acquire_or_lease, "model")
    scene.wait_until_moving(1)
    first.kill()
    outcome = acquiring(50)
    assert (outcome.source, outcome.touched) == ("lease", True)
    assert not is_alive(writer)
    receiver.call(instance.write, "model", 7)
    assert receiver.call(instance.publish, "model").error == ""
    assert published_on(scene.broker) == [("receiver", card_name(1))]


def test_a_killed_receiver_takes_no_source_from_anybody_and_leaves_nothing(scene: Scene) -> None:
    first, receiver, other = scene.publisher("first", 0), scene.receiver("receiver", 1), scene.receiver("other", 2)
    scene.warm_up(receiver, other)
    scene.cann.inject(Fault.SLOW_LINK, card=1, value=SLOW)
    receiver.begin(instance.acquire, "model")
    scene.wait_until_moving(1)
    receiver.kill()
    outcome = other.call(instance.acquire, "model")
    assert (outcome.error, outcome.source) == ("", "first")
    eventually(lambda: not cards(scene.broker)[card_name(1)].fetch_count)
    scene.cann.clear()
    eventually(lambda: not scene.cann.used_bytes()[1])
    assert first.call(instance.retract, "model").error == ""
    wait_until_idle(scene.broker)


def test_a_deadline_ends_the_transfer_and_says_that_nobody_writes(scene: Scene) -> None:
    """H5: the engine would go on writing."""
    first, receiver = scene.publisher("first", 0), scene.receiver("receiver", 1)
    scene.warm_up(receiver)
    (writer,) = cards(scene.broker)[card_name(1)].receiver_pids
    scene.cann.inject(Fault.SLOW_LINK, card=1, value=SLOW)
    receiver.call(instance.write, "model", None)
    outcome = receiver.call(instance.acquire, "model", timeout=5.0)
    assert (outcome.error, outcome.touched, outcome.quiesced) == ("AcquireTimeout", True, True)
    assert not is_alive(writer)
    receiver.call(instance.write, "model", 99)
    mine = receiver.call(instance.digest, "model")
    scene.cann.clear()
    time.sleep(1.0)
    assert receiver.call(instance.digest, "model") == mine, "bytes arrived after the error"
    scene.warm_up(receiver)
    assert receiver.call(instance.digest, "model") == first.call(instance.digest, "model")
    assert published_on(scene.broker) == [("first", card_name(0))], "its source was not harmed"


@pytest.mark.parametrize("role", ["sender", "receiver"])
def test_a_killed_card_process_costs_its_own_transfers_and_is_replaced(scene: Scene, role: str) -> None:
    first, receiver = scene.publisher("first", 0), scene.receiver("receiver", 1)
    scene.warm_up(receiver)
    scene.cann.inject(Fault.SLOW_LINK, card=1, value=SLOW)
    acquiring = receiver.begin(instance.acquire, "model")
    scene.wait_until_moving(1)
    known = cards(scene.broker)
    os.kill(
        known[card_name(0)].sender_pid if role == "sender" else known[card_name(1)].receiver_pids[0], signal.SIGKILL
    )
    outcome = acquiring(50)
    assert (outcome.error, outcome.touched, outcome.quiesced) == ("TransferFailed", True, True)
    scene.cann.clear()
    assert published_on(scene.broker) == [("first", card_name(0))], "what is published stays published"
    scene.warm_up(receiver)
    assert receiver.call(instance.digest, "model") == first.call(instance.digest, "model")
    assert first.call(instance.retract, "model").error == ""
    wait_until_idle(scene.broker)
    first.call(instance.free, "model")


def test_a_killed_broker_leaves_nobody_sure_of_the_memory_and_a_new_one_has_the_publications_back(
    scene: Scene,
) -> None:
    first, receiver = scene.publisher("first", 0), scene.receiver("receiver", 1)
    scene.warm_up(receiver)
    scene.cann.inject(Fault.SLOW_LINK, card=1, value=SLOW)
    acquiring = receiver.begin(instance.acquire, "model")
    scene.wait_until_moving(1)
    children = [pid for card in cards(scene.broker).values() for pid in (card.sender_pid, *card.receiver_pids) if pid]
    assert len(children) == 2
    scene.broker.kill()
    outcome = acquiring(50)
    assert (outcome.error, outcome.touched, outcome.quiesced) == ("TransferFailed", True, False)
    eventually(lambda: not any(map(is_alive, children)))
    scene.cann.clear()
    scene.broker.start()
    eventually(lambda: published_on(scene.broker) == [("first", card_name(0))])
    other = scene.receiver("other", 2)
    outcome = other.call(instance.acquire, "model")
    assert (outcome.error, outcome.source) == ("", "first")
    assert other.call(instance.digest, "model") == first.call(instance.digest, "model")
    assert receiver.call(instance.exports) == 1, "only the lost broker could have said that nothing writes"
    receiver.call(instance.close)
    assert receiver.call(instance.exports) == 0
    receiver.call(instance.free, "model")


@pytest.mark.parametrize("role", ["sender", "receiver"])
def test_a_card_process_that_the_worker_took_for_dead_is_replaced(scene: Scene, role: str) -> None:
    """As after a host has slept or swapped: the engine's client looks as before, but the other end has forgotten it."""
    first, receiver = scene.publisher("first", 0), scene.receiver("receiver", 1)
    scene.warm_up(receiver)
    found = cards(scene.broker)
    pid = found[card_name(0)].sender_pid if role == "sender" else found[card_name(1)].receiver_pids[0]
    os.kill(pid, signal.SIGSTOP)
    time.sleep(9)  # the worker waits for 5 s
    os.kill(pid, signal.SIGCONT)
    outcome = receiver.call(instance.acquire, "model")
    assert (outcome.error, outcome.source) == ("", "first")
    assert receiver.call(instance.digest, "model") == first.call(instance.digest, "model")


def test_a_retraction_waits_for_its_reader_and_then_the_memory_can_be_freed(scene: Scene) -> None:
    """H3: the engine does not count readers. The double's driver refuses to free what is mapped elsewhere."""
    first, receiver = scene.publisher("first", 0), scene.receiver("receiver", 1)
    scene.warm_up(receiver)
    expected = first.call(instance.digest, "model")
    scene.cann.inject(Fault.SLOW_LINK, card=1, value=SLOW)
    acquiring = receiver.begin(instance.acquire, "model")
    scene.wait_until_moving(1)
    late = first.call(instance.retract, "model", timeout=0.3)
    assert late.error == "RetractTimeout"
    scene.cann.clear()
    assert first.call(instance.retract, "model").error == ""
    first.call(instance.write, "model", None)
    assert acquiring(50).error == ""
    assert receiver.call(instance.digest, "model") == expected
    first.call(instance.free, "model")
    wait_until_idle(scene.broker)
    assert scene.cann.violations() == []


def test_wrong_bytes_are_found_and_their_source_is_not_read_again_by_this_receiver(scene: Scene) -> None:
    """The broker cannot read the memory: one report keeps the two apart, and takes the source from no other."""
    scene.publisher("first", 0)
    receiver, other = scene.receiver("receiver", 1), scene.receiver("other", 1)
    scene.cann.inject(Fault.CORRUPT_LINK, card=1)
    outcome = receiver.call(instance.acquire, "model")
    assert (outcome.error, outcome.touched, outcome.quiesced) == ("IntegrityError", True, True)
    scene.cann.clear()
    again = receiver.call(instance.acquire, "model")
    assert (again.error, again.touched) == ("TransferFailed", False)
    assert "this process reported wrong bytes" in again.message
    assert "tensors layer" in again.message
    assert other.call(instance.acquire, "model").source == "first"


def test_wrong_bytes_that_two_receivers_report_quarantine_the_source(scene: Scene) -> None:
    scene.publisher("first", 0)
    receivers = [scene.receiver(f"receiver-{number}", 1) for number in range(2)]
    scene.cann.inject(Fault.CORRUPT_LINK, card=1)
    for receiver in receivers:
        assert receiver.call(instance.acquire, "model").error == "IntegrityError"
    scene.cann.clear()
    eventually(lambda: scene.broker.publications()[0].state == resources_pb2.Publication.STATE_QUARANTINED)
    assert scene.receiver("third", 1).call(instance.acquire, "model").error == "WeightsNotFound"


def test_a_dead_source_costs_its_own_publication_and_the_others_on_its_card_are_served(scene: Scene) -> None:
    """The driver takes the memory of the dead from the card's one sender, which can do nothing more with the card."""
    first, other = scene.publisher("first", 0), scene.host.start_instance("other")
    other.call(instance.create, "other", 0, MODEL, 9)
    assert other.call(instance.publish, "other").error == ""
    receiver, late = scene.receiver("receiver", 1), scene.host.start_instance("late")
    late.call(instance.create, "other", 1, MODEL, None)
    scene.warm_up(receiver)
    sender = cards(scene.broker)[card_name(0)].sender_pid
    scene.cann.inject(Fault.SLOW_LINK, card=1, value=SLOW)
    acquiring = receiver.begin(instance.acquire, "model")
    scene.wait_until_moving(1)
    first.kill()
    assert acquiring(40).error in ("TransferFailed", "WeightsNotFound")
    scene.cann.clear()
    assert late.call(instance.acquire, "other").error == ""
    assert late.call(instance.digest, "other") == other.call(instance.digest, "other")
    assert cards(scene.broker)[card_name(0)].sender_pid != sender
    assert published_on(scene.broker) == [("other", card_name(0))]
    assert scene.cann.violations() == []


def test_an_interrupted_instance_is_not_written_to_any_more(scene: Scene) -> None:
    first, receiver = scene.publisher("first", 0), scene.receiver("receiver", 1)
    scene.warm_up(receiver)
    scene.cann.inject(Fault.SLOW_LINK, card=1, value=SLOW)
    acquiring = receiver.begin(instance.acquire_until_interrupted, "model", 99)
    scene.wait_until_moving(1)
    os.kill(receiver.pid, signal.SIGINT)
    mine = acquiring(50)
    scene.cann.clear()
    time.sleep(1.0)
    assert receiver.call(instance.digest, "model") == mine, "bytes arrived after the interruption"
    scene.warm_up(receiver)
    assert receiver.call(instance.digest, "model") == first.call(instance.digest, "model")


def test_a_worker_that_is_killed_costs_a_bounded_time_and_comes_back(
    cann_host: CannHost, device_host: DeviceHost
) -> None:
    worker = DatasystemWorker().start()
    try:
        device_host.worker = worker
        scene = Scene(device_host)
        first, receiver = scene.publisher("first", 0), scene.receiver("receiver", 1)
        scene.warm_up(receiver)
        worker.kill()
        outcome = receiver.call(instance.acquire, "model", timeout=ENGINE_WAITS - 10)
        assert (outcome.error, outcome.quiesced) == ("TransferFailed", True)
        eventually(lambda: not scene.broker.host().datasystem_worker.reachable)
        same_card = scene.receiver("same card", 0)
        worker.start()
        eventually(lambda: scene.broker.host().datasystem_worker.reachable)
        assert published_on(scene.broker) == [("first", card_name(0))]
        for process in (receiver, same_card):
            eventually(partial(is_filled, process), within=60, every=0.5)
            assert process.call(instance.digest, "model") == first.call(instance.digest, "model")
    finally:
        worker.close()


def test_without_a_worker_publishing_is_refused_at_once_with_the_reason(
    device_host: DeviceHost,
) -> None:
    (port,) = free_ports(1)
    broker = device_host.start_broker(worker_port=port)
    process = device_host.start_instance("first")
    process.call(instance.create, "model", 0, MODEL, 8)
    outcome = process.call(instance.acquire_or_load, "model", 7)
    assert outcome.source == "disk"
    assert f"no datasystem worker answers at 127.0.0.1:{port}" in outcome.message
    assert {card.state for card in cards(broker).values()} == {2}
    assert all("no datasystem worker" in card.problem for card in cards(broker).values())
    assert broker.publications() == []
    assert process.call(instance.exports) == 0
