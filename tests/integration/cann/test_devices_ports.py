"""HCCL's ports: engines of several ranks hold the default ones of their cards, and the broker's processes take none."""

from __future__ import annotations

import os

import pytest

from doubles.cann.control import card_name
from support import acl, card_actions
from support import device_instance as instance
from support.device_host import DeviceHost, cards, wait_until_idle
from support.device_instance import Tensor
from support.waiting import eventually

MIB = 1 << 20
BYTES = 64 << 10
PORTS = ("HCCL_NPU_SOCKET_PORT_RANGE", "HCCL_HOST_SOCKET_PORT_RANGE")
MODEL = [Tensor("a.weight", (2 * MIB,), "int8"), Tensor("b.weight", (700, 333), "float16")]

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(any(name in os.environ for name in PORTS), reason="HCCL's ports are chosen in this environment"),
]


class Engine:
    """Two ranks on two cards, with a communicator on HCCL's default ports."""

    def __init__(self, host: DeviceHost, name: str, first_card: int) -> None:
        self.ranks = [host.start_instance(f"{name}-{rank}") for rank in range(2)]
        for rank, process in enumerate(self.ranks):
            process.call(instance.create, f"rank {rank}", first_card + rank, MODEL)
        root = self.ranks[0].call(acl.root_info)
        waiting = self.ranks[0].begin(card_actions.meet, root, 0)
        there = self.ranks[1].call(card_actions.meet, root, 1)
        self._ends = [waiting(60), there]

    def load(self, seed: int) -> list[instance.Outcome]:
        """Both ranks at once."""
        loads = [
            process.begin(instance.acquire_or_load, f"rank {rank}", seed + rank)
            for rank, process in enumerate(self.ranks)
        ]
        return [load(90) for load in loads]

    def digests(self) -> list[str]:
        return [process.call(instance.digest, f"rank {rank}") for rank, process in enumerate(self.ranks)]

    def exchange(self) -> bytes:
        """What rank 1 receives of rank 0's bytes, over their own communicator."""
        source, destination = (process.call(acl.malloc, BYTES) for process in self.ranks)
        self.ranks[0].call(acl.write, source, b"x" * BYTES)
        sent = self.ranks[0].begin(card_actions.send, *self._ends[0], 1, source, BYTES)
        self.ranks[1].call(card_actions.receive, *self._ends[1], 0, destination, BYTES)
        sent(60)
        return self.ranks[1].call(acl.read, destination, BYTES)


def test_the_broker_transfers_while_engines_hold_the_default_ports_of_every_card(device_host: DeviceHost) -> None:
    broker = device_host.start_broker()
    first, second = Engine(device_host, "first", 0), Engine(device_host, "second", 2)
    assert [load.source for load in first.load(7)] == ["disk", "disk"]
    filled = second.load(70)
    assert [(load.source, load.data_plane) for load in filled] == [("first-0", "datasystem"), ("first-1", "datasystem")]
    assert second.digests() == first.digests()
    assert all(cards(broker)[card_name(card)].sender_pid for card in range(4)), "a process of the broker on each card"
    for engine in (first, second):
        assert engine.exchange() == b"x" * BYTES
    assert device_host.cann.violations() == []


def test_an_engine_that_starts_after_the_brokers_processes_finds_its_ports_free(device_host: DeviceHost) -> None:
    broker = device_host.start_broker()
    first, second = Engine(device_host, "first", 0), Engine(device_host, "second", 2)
    first.load(7)
    second.load(70)
    expected = first.digests()
    for process in first.ranks:
        process.kill()
    third = Engine(device_host, "third", 0)
    assert [load.source for load in third.load(700)] == ["second-0", "second-1"]
    assert third.digests() == expected
    assert third.exchange() == b"x" * BYTES
    for process in (*second.ranks, *third.ranks):
        process.kill()
    wait_until_idle(broker)
    assert device_host.cann.violations() == []


def test_a_broker_that_is_given_the_engines_ports_fails_the_transfer_and_the_engine_loads_from_disk(
    device_host: DeviceHost,
) -> None:
    broker = device_host.start_broker(settings={PORTS[0]: "16666", PORTS[1]: "60000-60031"})
    first, second = Engine(device_host, "first", 0), Engine(device_host, "second", 2)
    first.load(7)
    filled = second.load(70)
    assert [load.source for load in filled] == ["disk", "disk"]
    # HCCL's words in the transfers' failures
    eventually(lambda: broker.log.count("resource unavailable") >= len(filled))
    assert second.exchange() == b"x" * BYTES
