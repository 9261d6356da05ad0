"""A card's weights, published as a copy in host memory, fill any card, also after their owner has changed its own."""

from __future__ import annotations

import pytest

from doubles.cann.control import Fault
from support import device_instance as instance
from support.device_host import DeviceHost, wait_until_idle
from support.device_instance import MIXED
from support.device_scene import SLOW, Scene

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("digest_mode", ["auto", "full"])
@pytest.mark.parametrize("device_path", ["auto", "staged"])
def test_a_card_is_filled_from_the_host_copy_of_weights_that_their_owner_has_changed(
    device_host: DeviceHost, digest_mode: str, device_path: str
) -> None:
    broker = device_host.start_broker()
    first, second, third = (
        device_host.start_instance(name, DIGEST_MODE=digest_mode, WEIGHT_BROKER_DEVICE_PATH=device_path)
        for name in ("first", "second", "third")
    )
    for card, process in enumerate((first, second, third)):
        process.call(instance.create, "model", card, MIXED, 7 if process is first else None)
    published = first.call(instance.digest, "model")
    assert first.call(instance.publish, "model", in_host_memory=True).error == ""
    assert first.call(instance.exports) == 0
    first.call(instance.write, "model", 99)
    filled = second.call(instance.acquire_or_load, "model", 8)
    assert (filled.source, filled.data_plane, filled.path) == ("first", "local", "copy")
    assert second.call(instance.digest, "model") == published
    first.kill()
    second.call(instance.write, "model", 98)
    filled = third.call(instance.acquire, "model")
    assert filled.source == "second", "what arrived is shared again, and is a copy too"
    assert third.call(instance.digest, "model") == published
    assert second.call(instance.exports) == third.call(instance.exports) == 0
    assert second.call(instance.retract, "model").error == ""
    wait_until_idle(broker)
    assert device_host.cann.violations() == []


def test_a_card_is_rather_filled_from_a_card(device_host: DeviceHost) -> None:
    device_host.start_broker()
    first, second, third = (device_host.start_instance(name) for name in ("first", "second", "third"))
    for card, process in enumerate((first, second, third)):
        process.call(instance.create, "model", card, MIXED, None if process is third else 7)
    assert first.call(instance.publish, "model", in_host_memory=True).error == ""
    assert second.call(instance.publish, "model").error == ""
    assert third.call(instance.acquire, "model").source == "second"
    assert third.call(instance.digest, "model") == first.call(instance.digest, "model")


def test_whoever_waits_for_a_load_gets_its_copy_in_host_memory(device_host: DeviceHost) -> None:
    device_host.start_broker()
    first, second = device_host.start_instance("first"), device_host.start_instance("second")
    first.call(instance.create, "model", 0, MIXED, 7)
    second.call(instance.create, "model", 1, MIXED, None)
    assert first.call(instance.acquire_or_lease, "model").source == "lease"
    waiting = second.begin(instance.acquire_or_load, "model", 8)
    first.call(instance.write, "model", 7)
    assert first.call(instance.publish, "model", in_host_memory=True).error == ""
    assert waiting(60).source == "first"
    assert second.call(instance.digest, "model") == first.call(instance.digest, "model")


def test_a_lost_transfer_between_cards_is_made_good_from_host_memory(device_host: DeviceHost) -> None:
    scene = Scene(device_host)
    first, receiver = scene.publisher("first", 0), scene.receiver("receiver", 1)
    scene.warm_up(receiver)
    copied = scene.receiver("copied", 2)
    copied.call(instance.write, "model", 7)
    assert copied.call(instance.publish, "model", in_host_memory=True).error == ""
    scene.cann.inject(Fault.SLOW_LINK, card=1, value=SLOW)
    acquiring = receiver.begin(instance.acquire, "model")
    scene.wait_until_moving(1)
    first.kill()
    outcome = acquiring(100)
    assert (outcome.error, outcome.source) == ("", "copied")
    assert receiver.call(instance.digest, "model") == copied.call(instance.digest, "model")
    assert copied.call(instance.retract, "model").error == ""
    wait_until_idle(scene.broker)
