"""Between two cards without the datasystem: a process of the receiver's card maps the source's memory and copies it."""

from __future__ import annotations

import urllib.request

import pytest

from doubles.cann.control import Fault, card_name
from support import device_instance as instance
from support.card_process import CardProcess
from support.datasystem_worker import free_ports
from support.device_host import DeviceHost, cards, wait_until_idle
from support.device_scene import MODEL, SLOW, Scene
from support.waiting import eventually
from weight_broker.v1 import resources_pb2

pytestmark = pytest.mark.timeout(120)

LOCAL, PEER_COPY, DATASYSTEM = (
    resources_pb2.DATA_PLANE_LOCAL,
    resources_pb2.DATA_PLANE_PEER_COPY,
    resources_pb2.DATA_PLANE_DATASYSTEM,
)


def scene_of(device_host: DeviceHost, **settings: str) -> Scene:
    return Scene(device_host, WEIGHT_BROKER_CARDS_PEER_COPY="on", **settings)


def planes(scene: Scene) -> list[resources_pb2.DataPlane.ValueType]:
    """Of all transfers, the first one first."""
    return [transfer.data_plane for transfer in reversed(scene.broker.transfers())]


def same(scene: Scene, receiver: CardProcess, source: CardProcess) -> None:
    """The bytes are the source's, and the driver was used as it is to be."""
    assert receiver.call(instance.digest, "model") == source.call(instance.digest, "model")
    assert scene.cann.violations() == []


@pytest.mark.parametrize("chunks", [False, True], ids=["plain allocations", "chunks"])
def test_a_card_is_filled_from_another_one_without_a_communicator(device_host: DeviceHost, chunks: bool) -> None:
    scene = scene_of(device_host)
    first, second = (device_host.start_instance(name) for name in ("first", "second"))
    first.call(instance.create, "model", 0, MODEL, 7, chunks=chunks)
    second.call(instance.create, "model", 1, MODEL, chunks=chunks)
    assert first.call(instance.publish, "model").error == ""
    filled = second.call(instance.acquire, "model")
    assert (filled.error, filled.source, filled.data_plane, filled.path) == ("", "first", "peer_copy", "copy")
    same(scene, second, first)
    assert planes(scene) == [PEER_COPY]
    assert not any(scene.cann.counters(pid)["bytes_sent"] for pid in scene.cann.processes())
    assert first.call(instance.retract, "model").error == ""
    wait_until_idle(scene.broker)


def test_within_a_card_nothing_changes(device_host: DeviceHost) -> None:
    scene = scene_of(device_host)
    first, second = scene.publisher("first", 2), scene.receiver("second", 2)
    filled = second.call(instance.acquire, "model")
    assert (filled.error, filled.data_plane) == ("", "local")
    same(scene, second, first)
    assert planes(scene) == [LOCAL]


def test_what_a_card_refuses_the_datasystem_moves_in_the_same_transfer(device_host: DeviceHost) -> None:
    port = free_ports(1)[0]
    scene = scene_of(device_host, WEIGHT_BROKER_METRICS_LISTEN=f"127.0.0.1:{port}")
    first, second, third = scene.publisher("first", 0), scene.receiver("second", 1), scene.receiver("third", 2)
    scene.cann.inject(Fault.NO_PEER_ACCESS, card=1)
    for _ in range(2):
        filled = second.call(instance.acquire, "model")
        assert (filled.error, filled.data_plane, filled.path) == ("", "datasystem", "copy")
    same(scene, second, first)
    eventually(lambda: "transfer_rerouted" in scene.broker.log and "peer_copy_refused" in scene.broker.log)
    assert scene.broker.log.count("transfer_rerouted") == 1, "the broker knows it the second time"
    assert scene.broker.log.count("peer_copy_refused") == 1
    assert third.call(instance.acquire, "model").data_plane == "peer_copy"
    assert planes(scene) == [DATASYSTEM, DATASYSTEM, PEER_COPY]
    metrics = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60).read().decode()
    assert 'weight_broker_transfers_total{data_plane="datasystem"} 2.0' in metrics
    assert 'weight_broker_transfers_total{data_plane="peer_copy"} 1.0' in metrics
    assert first.call(instance.retract, "model").error == ""
    wait_until_idle(scene.broker)


def test_a_receiver_that_nothing_may_map_is_staged_and_says_nothing_about_its_card(device_host: DeviceHost) -> None:
    scene = scene_of(device_host)
    first, second = scene.publisher("first", 0), scene.receiver("second", 1)
    assert second.call(instance.acquire, "model").data_plane == "peer_copy"
    (receiver,) = cards(scene.broker)[card_name(1)].receiver_pids
    scene.cann.inject(Fault.IMPORT_REFUSED, pid=receiver)
    filled = second.call(instance.acquire, "model")
    assert (filled.error, filled.data_plane, filled.path) == ("", "datasystem", "staged")
    scene.cann.clear()
    filled = second.call(instance.acquire, "model")
    assert (filled.error, filled.data_plane, filled.path) == ("", "peer_copy", "copy")
    same(scene, second, first)
    assert planes(scene) == [PEER_COPY, DATASYSTEM, PEER_COPY]


def test_an_instance_killed_in_mid_copy_costs_its_own_readers_only(device_host: DeviceHost) -> None:
    scene = scene_of(device_host)
    first, other = scene.publisher("first", 0), device_host.start_instance("other")
    other.call(instance.create, "another", 0, MODEL, 9)
    assert other.call(instance.publish, "another").error == ""
    sender = cards(scene.broker)[card_name(0)].sender_pid
    readers = scene.receiver("second", 1), device_host.start_instance("third")
    readers[1].call(instance.create, "another", 2, MODEL)
    for card in (1, 2):
        scene.cann.inject(Fault.SLOW_LINK, card=card, value=SLOW)
    acquiring = readers[0].begin(instance.acquire, "model"), readers[1].begin(instance.acquire, "another")
    for card in (1, 2):
        scene.wait_until_moving(card)
    first.kill()
    lost = acquiring[0](60)
    assert (lost.error, lost.touched, lost.quiesced) == ("TransferFailed", True, True)
    scene.cann.clear()
    filled = acquiring[1](60)
    assert (filled.error, filled.source, filled.data_plane) == ("", "other", "peer_copy")
    assert readers[1].call(instance.digest, "another") == other.call(instance.digest, "another")
    assert cards(scene.broker)[card_name(0)].sender_pid == sender, "the card's sender serves on"
    again = scene.publisher("again", 0)
    filled = readers[0].call(instance.acquire, "model")
    assert (filled.error, filled.source, filled.data_plane) == ("", "again", "peer_copy")
    same(scene, readers[0], again)


def test_a_killed_receiver_leaves_nothing_on_the_cards(device_host: DeviceHost) -> None:
    scene = scene_of(device_host)
    first, second, third = scene.publisher("first", 0), scene.receiver("second", 1), scene.receiver("third", 2)
    scene.cann.inject(Fault.SLOW_LINK, card=1, value=SLOW)
    second.begin(instance.acquire, "model")
    scene.wait_until_moving(1)
    second.kill()
    assert third.call(instance.acquire, "model").data_plane == "peer_copy"
    same(scene, third, first)
    eventually(lambda: not cards(scene.broker)[card_name(1)].fetch_count)
    assert first.call(instance.retract, "model").error == ""
    wait_until_idle(scene.broker)
