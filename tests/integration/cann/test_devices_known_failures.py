"""Ways in which systems that fill weights from a running peer are known to have failed, tried on this one."""

from __future__ import annotations

import os
import signal

import pytest

from doubles.cann.control import Fault, card_name
from support import device_instance as instance
from support.device_host import DeviceHost, cards, published_on
from support.device_instance import Tensor
from support.device_scene import MODEL, SLOW, Scene
from support.waiting import eventually

pytestmark = pytest.mark.timeout(180)


def test_a_reader_that_crashes_does_not_keep_the_only_slot_of_its_source(device_host: DeviceHost) -> None:
    scene = Scene(device_host, WEIGHT_BROKER_LIMITS_READERS_PER_PUBLICATION="1")
    scene.publisher("first", 0)
    crashing, next_one = scene.receiver("crashing", 1), scene.receiver("next", 2)
    scene.cann.inject(Fault.SLOW_LINK, card=1, value=SLOW)
    crashing.begin(instance.acquire, "model")
    scene.wait_until_moving(1)
    waiting = next_one.begin(instance.acquire, "model")
    eventually(lambda: scene.broker.host().waiting_acquisition_count == 1)
    crashing.kill()
    assert waiting(60).source == "first"


def test_the_same_shape_and_type_in_another_memory_format_is_another_layout(device_host: DeviceHost) -> None:
    device_host.start_broker()
    first, second = device_host.start_instance("first"), device_host.start_instance("second")
    first.call(instance.create, "model", 0, [Tensor("weight", (16, 16), "int8", padding=256)], 7)
    second.call(instance.create, "model", 1, [Tensor("weight", (16, 16), "int8")], 5)
    first.call(instance.publish, "model")
    outcome = second.call(instance.acquire, "model")
    assert (outcome.error, outcome.touched) == ("LayoutMismatch", False)
    assert "memory_format" in outcome.message


def test_who_received_wrong_bytes_loads_from_disk_and_takes_the_source_from_no_other(device_host: DeviceHost) -> None:
    scene = Scene(device_host)
    scene.publisher("first", 0)
    second, third = scene.receiver("second", 1), scene.receiver("third", 2)
    scene.cann.inject(Fault.CORRUPT_LINK, card=1)
    assert second.call(instance.acquire_or_load, "model", 7).source == "disk"
    assert third.call(instance.acquire, "model").source == "first", "its link is not broken"
    assert third.call(instance.digest, "model") == second.call(instance.digest, "model")


def test_a_model_that_arrived_half_is_loaded_whole(device_host: DeviceHost) -> None:
    scene = Scene(device_host)
    first, second = scene.publisher("first", 0), scene.receiver("second", 1)
    scene.cann.inject(Fault.SLOW_LINK, card=1, value=SLOW)
    loading = second.begin(instance.acquire_or_load, "model", 7)
    scene.wait_until_moving(1)
    expected = first.call(instance.digest, "model")
    first.kill()
    assert loading(60).source == "disk"
    assert second.call(instance.digest, "model") == expected
    assert published_on(scene.broker) == [("second", card_name(1))]


def test_weights_that_are_updated_in_place_are_never_read_half_old_half_new(device_host: DeviceHost) -> None:
    scene = Scene(device_host)
    first, second = scene.publisher("first", 0), scene.receiver("second", 1)
    generations = [one.generation for one in scene.broker.publications()]
    scene.warm_up(second)
    old = second.call(instance.digest, "model")
    assert first.call(instance.retract, "model").error == ""
    assert second.call(instance.acquire, "model", wait=False).error == "WeightsNotFound", "while it is written"
    first.call(instance.write, "model", 8)
    assert first.call(instance.publish, "model").error == ""
    scene.warm_up(second)
    assert second.call(instance.digest, "model") == first.call(instance.digest, "model") != old
    assert [one.generation for one in scene.broker.publications()] > generations


def test_a_pid_or_an_address_that_comes_again_is_not_taken_for_what_it_was(device_host: DeviceHost) -> None:
    """An instance dies while a reader holds its key; another one has the same memory at the same address at once."""
    scene = Scene(device_host)
    first, second = scene.publisher("first", 0), scene.receiver("second", 1)
    scene.warm_up(second)
    first.kill()
    again = scene.receiver("again", 0, seed=9)
    assert second.call(instance.acquire, "model", wait=False).error == "WeightsNotFound"
    assert again.call(instance.publish, "model").error == ""
    scene.warm_up(second)
    assert second.call(instance.digest, "model") == again.call(instance.digest, "model")


def test_a_stopped_instance_serves_and_a_card_process_that_hangs_is_given_up(device_host: DeviceHost) -> None:
    """A source that does not answer must not be chosen for ever; one whose process merely stands still is fine."""
    scene = Scene(device_host, WEIGHT_BROKER_CARDS_REQUEST_SECONDS="3")
    first, second = scene.publisher("first", 0), scene.receiver("second", 1)
    scene.warm_up(second)
    os.kill(first.pid, signal.SIGSTOP)
    scene.warm_up(second)
    os.kill(first.pid, signal.SIGCONT)
    hung = cards(scene.broker)[card_name(0)].sender_pid
    os.kill(hung, signal.SIGSTOP)
    outcome = second.call(instance.acquire, "model", timeout=50.0)
    assert (outcome.error, outcome.quiesced) == ("TransferFailed", True)
    eventually(lambda: cards(scene.broker)[card_name(0)].sender_pid not in (0, hung))
    scene.warm_up(second)
    assert second.call(instance.digest, "model") == first.call(instance.digest, "model")


def test_receivers_on_all_cards_at_once_are_served_although_a_source_takes_few_at_a_time(
    device_host: DeviceHost,
) -> None:
    Scene(device_host, WEIGHT_BROKER_LIMITS_READERS_PER_PUBLICATION="2")
    small = [tensor._replace(shape=(64, 1024)) for tensor in MODEL]
    first = device_host.start_instance("first")
    first.call(instance.create, "small", 0, small, 7)
    assert first.call(instance.publish, "small").error == ""
    receivers = [device_host.start_instance(f"receiver-{number}") for number in range(7)]
    for number, receiver in enumerate(receivers):
        receiver.call(instance.create, "small", number % 7 + 1, small)
    calls = [receiver.begin(instance.acquire_or_load, "small", 1) for receiver in receivers]
    for call in calls:
        assert call(120).source not in ("", "disk")
    assert {receiver.call(instance.digest, "small") for receiver in receivers} == {first.call(instance.digest, "small")}
