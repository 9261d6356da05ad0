"""Instances on cards, a real broker, the real datasystem: weights move where they lie, and nothing else does."""

from __future__ import annotations

import pytest

from support import device_instance as instance
from support.device_host import DeviceHost, cards, published_on, wait_until_idle
from support.device_instance import Tensor

KIB, MIB = 1 << 10, 1 << 20

pytestmark = pytest.mark.timeout(120)

MIXED = [
    Tensor("a.weight", (1024, 1536)),
    Tensor("b.weight", (700, 333), "float16"),
    Tensor("c.bias", (77,), "float32"),
    Tensor("d.scale", ()),
    Tensor("e.empty", (0, 4)),
    Tensor("f.int8", (3, 5), "int8", padding=512 - 15),
    Tensor("g.tied", (1024, 1536), alias_of="a.weight"),
]


@pytest.mark.parametrize("chunks", [False, True], ids=["plain allocations", "chunks"])
def test_the_second_instance_is_filled_from_another_card_bit_for_bit(device_host: DeviceHost, chunks: bool) -> None:
    broker = device_host.start_broker()
    first, second = device_host.start_instance("first"), device_host.start_instance("second")
    first.call(instance.create, "model", 0, MIXED, 7, chunks=chunks)
    second.call(instance.create, "model", 1, MIXED, None, chunks=chunks)
    assert first.call(instance.acquire_or_lease, "model").source == "lease"
    assert first.call(instance.publish, "model").error == ""
    filled = second.call(instance.acquire_or_load, "model", 8)
    assert (filled.source, filled.data_plane, filled.path) == ("first", "datasystem", "copy")
    assert second.call(instance.digest, "model") == first.call(instance.digest, "model")
    assert published_on(broker) == [("first", "npu:0"), ("second", "npu:1")]
    assert {name for name, card in cards(broker).items() if card.sender_pid} == {"npu:0", "npu:1"}
    for one in (first, second):
        assert one.call(instance.retract, "model").error == ""
        assert one.call(instance.exports) == 0
    wait_until_idle(broker)
    assert device_host.cann.violations() == []


def test_an_instance_on_the_same_card_is_filled_by_a_copy_on_the_card(device_host: DeviceHost) -> None:
    device_host.start_broker()
    first, second = device_host.start_instance("first"), device_host.start_instance("second")
    first.call(instance.create, "model", 2, MIXED, 7)
    second.call(instance.create, "model", 2, MIXED, None)
    first.call(instance.publish, "model")
    filled = second.call(instance.acquire, "model")
    assert (filled.source, filled.data_plane, filled.path) == ("first", "local", "copy")
    assert second.call(instance.digest, "model") == first.call(instance.digest, "model")
    assert second.call(instance.exports) == 0
    assert device_host.cann.violations() == []
