"""Weights that the broker does not map go through its staging buffers, copied by the instances, bit for bit."""

from __future__ import annotations

import pytest

from doubles.cann.control import Fault
from support import device_instance as instance
from support.device_host import DeviceHost, wait_until_idle
from support.device_instance import MIXED, Tensor
from support.waiting import eventually

KIB, MIB = 1 << 10, 1 << 20

pytestmark = pytest.mark.timeout(180)

LARGE = [*MIXED, Tensor("h.large", (9 * MIB + 333,), "int8"), *(Tensor(f"i.{i:03}", (i + 1, 7)) for i in range(300))]
"""Several chunks of 2 MiB; tensors across their edges, and many in one."""
SMALL_BUFFER = {"WEIGHT_BROKER_CARDS_STAGING_BYTES": str(4 * MIB)}


@pytest.mark.parametrize("card", [0, 1], ids=["same card", "other card"])
@pytest.mark.parametrize(
    ("source", "receiver"), [(False, True), (True, False), (True, True)], ids=["receiver", "source", "both"]
)
def test_what_cannot_be_mapped_is_staged_bit_for_bit(
    device_host: DeviceHost, source: bool, receiver: bool, card: int
) -> None:
    broker = device_host.start_broker(settings=SMALL_BUFFER)
    first, second = device_host.start_instance("first"), device_host.start_instance("second")
    first.call(instance.create, "model", 0, LARGE, 7, sleeps=source)
    second.call(instance.create, "model", card, LARGE, None, sleeps=receiver)
    assert first.call(instance.publish, "model").error == ""
    assert [one.is_staged for one in broker.publications()] == [source]
    filled = second.call(instance.acquire, "model")
    assert (filled.error, filled.source, filled.path) == ("", "first", "staged")
    assert filled.data_plane == ("local" if card == 0 else "datasystem")
    assert second.call(instance.digest, "model") == first.call(instance.digest, "model")
    assert first.call(instance.retract, "model").error == ""
    wait_until_idle(broker)
    eventually(lambda: not first.call(instance.stage_threads) and not second.call(instance.stage_threads))
    assert "imports" not in {**first.live, **second.live}
    assert device_host.cann.violations() == []


def test_what_the_card_may_not_import_is_staged_without_being_asked_for(device_host: DeviceHost) -> None:
    broker = device_host.start_broker(faults={Fault.IMPORT_REFUSED: 0})
    first, second = device_host.start_instance("first"), device_host.start_instance("second")
    first.call(instance.create, "model", 0, MIXED, 7)
    second.call(instance.create, "model", 1, MIXED, None)
    assert first.call(instance.publish, "model").error == ""
    assert [one.is_staged for one in broker.publications()] == [True]
    filled = second.call(instance.acquire_or_load, "model", 8)
    assert (filled.error, filled.source, filled.path) == ("", "first", "staged")
    assert [(one.instance_name, one.is_staged) for one in broker.publications()] == [("first", True), ("second", True)]
    assert second.call(instance.digest, "model") == first.call(instance.digest, "model")
    for one in (first, second):
        assert one.call(instance.retract, "model").error == ""
        assert one.call(instance.exports) == 0
    assert device_host.cann.violations() == []


def test_what_its_owner_may_not_export_is_staged_without_being_asked_for(device_host: DeviceHost) -> None:
    broker = device_host.start_broker()
    refused = {Fault.EXPORT_REFUSED: 0.0}
    first, second = (device_host.start_instance(name, faults=refused) for name in ("first", "second"))
    third = device_host.start_instance("third")
    for one, card in ((second, 1), (third, 2)):
        one.call(instance.create, "model", card, MIXED, None)
    first.call(instance.create, "model", 0, MIXED, 7)
    assert first.call(instance.acquire_or_lease, "model").source == "lease"
    assert first.call(instance.publish, "model").error == ""
    assert second.call(instance.acquire_or_load, "model", 8).path == "staged"
    first.call(instance.retract, "model")
    filled = third.call(instance.acquire_or_load, "model", 8)  # what was received staged is a source again
    assert (filled.source, filled.path) == ("second", "staged")
    assert {one.instance_name: one.is_staged for one in broker.publications()} == {"second": True, "third": False}
    assert third.call(instance.digest, "model") == first.call(instance.digest, "model")
    assert device_host.cann.violations() == []


def test_the_broker_forces_a_path(device_host: DeviceHost) -> None:
    broker = device_host.start_broker(settings={"WEIGHT_BROKER_CARDS_PATH": "staged"})
    first, second = device_host.start_instance("first"), device_host.start_instance("second")
    first.call(instance.create, "model", 0, MIXED, 7)
    second.call(instance.create, "model", 1, MIXED, None)
    assert first.call(instance.publish, "model").error == ""
    assert second.call(instance.acquire, "model").path == "staged"
    assert broker.transfers()[0].path == 3
    assert second.call(instance.digest, "model") == first.call(instance.digest, "model")
    broker.terminate()
    broker = device_host.start_broker(settings={"WEIGHT_BROKER_CARDS_PATH": "direct"})
    for one in (first, second):
        one.call(instance.close)
    first.call(instance.create, "asleep", 0, MIXED, 7, sleeps=True)
    refused = first.call(instance.publish, "asleep")
    assert refused.error == "PublishRefused"
    assert "cards.path" in refused.message
    refused = first.call(instance.acquire, "asleep")
    assert (refused.error, refused.touched, refused.quiesced) == ("TransferFailed", False, True)
    assert "cards.path" in refused.message


def test_an_instance_forces_its_path(device_host: DeviceHost) -> None:
    broker = device_host.start_broker()
    first = device_host.start_instance("first", WEIGHT_BROKER_DEVICE_PATH="staged")
    second = device_host.start_instance("second", WEIGHT_BROKER_DEVICE_PATH="direct")
    first.call(instance.create, "model", 0, MIXED, 7)
    assert first.call(instance.publish, "model").error == ""
    assert [one.is_staged for one in broker.publications()] == [True]
    second.call(instance.create, "model", 1, MIXED, None, sleeps=True)
    refused = second.call(instance.acquire, "model")
    assert (refused.error, refused.touched) == ("TransferFailed", False)
    assert "cannot be filled where they are" in refused.message


def test_one_process_may_be_both_sides(device_host: DeviceHost) -> None:
    device_host.start_broker(settings=SMALL_BUFFER)
    only = device_host.start_instance("only")
    only.call(instance.create, "model", 0, LARGE, 7, sleeps=True)
    published = only.call(instance.digest, "model")
    assert only.call(instance.publish, "model").error == ""
    only.call(instance.create_again, "model", LARGE, sleeps=True)
    assert only.call(instance.acquire, "model").path == "staged"
    assert only.call(instance.digest, "model") == published
    assert "imports" not in only.live
    assert device_host.cann.violations() == []
