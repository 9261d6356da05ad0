"""A staging buffer that an instance has mapped lives until the instance has let go of it or died, also when its owner
is about to be ended and when the broker is killed: the driver takes the memory of a process that ends from everyone."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket

import pytest

from doubles.cann.control import CannHost, Fault, card_name, is_alive
from support import acl
from support import device_instance as instance
from support.broker_process import BrokerProcess
from support.card_process import CardProcess
from support.cards import CardScene, until
from support.device_host import DeviceHost, cards
from support.device_instance import Tensor
from support.waiting import eventually
from weight_brokerd.kinds.npu.supervisor import CardSupervisor

MIB = 1 << 20
MODEL = [Tensor(f"layer{index}", (4 * MIB,), "int8") for index in range(4)]
SLOW = 1.5 * MIB
"""Bytes per second, on which a chunk of 2 MiB takes more than one."""
SETTINGS = {"WEIGHT_BROKER_CARDS_STAGING_BYTES": str(4 * MIB)}

pytestmark = pytest.mark.timeout(240)


class Transfer:
    """A staged transfer from `source` to `destination`, which runs."""

    def __init__(self, host: DeviceHost, destination_card: int) -> None:
        self.host = host
        self.broker: BrokerProcess = host.start_broker(settings=SETTINGS)
        self.source, self.destination = host.start_instance("source"), host.start_instance("destination")
        self.source.call(instance.create, "model", 0, MODEL, 7, sleeps=True)
        self.destination.call(instance.create, "model", destination_card, MODEL, None, sleeps=True)
        assert self.source.call(instance.publish, "model").error == ""
        self.used = host.cann.used_bytes()
        host.cann.inject(Fault.SLOW_LINK, card=destination_card, value=SLOW)
        self.answer = self.destination.begin(instance.acquire, "model")
        self.card = card_name(destination_card)
        eventually(lambda: all(map(has_mapped, (self.source, self.destination))), within=60)

    @property
    def owners(self) -> dict[str, int]:
        """The card processes, by their role."""
        found = cards(self.broker)
        sender = {"sender": found[card_name(0)].sender_pid}
        return {**sender, "receiver": found[self.card].receiver_pids[0]}

    def hang(self, process: CardProcess) -> None:
        """The process stops, and the broker has asked it for a copy: nothing else moves any more."""
        process.process.send_signal(signal.SIGSTOP)
        self.host.cann.clear()
        quiet = 0

        def is_quiet() -> bool:
            nonlocal quiet
            quiet = quiet + 1 if cards(self.broker)[card_name(0)].offer_count == 0 else 0
            return quiet > 20

        eventually(is_quiet, within=60)


def left_behind(broker: BrokerProcess) -> list[int]:
    """The card processes of an earlier broker that the log names."""
    events = [json.loads(line) for line in broker.log.splitlines() if line.startswith("{")]
    return [pid for event in events if event["event"] == "card_processes_left_behind" for pid in event["pids"]]


def has_mapped(process: CardProcess) -> bool:
    """Whether the process has a staging buffer mapped."""
    return bool(process.live.get("imports"))


@pytest.mark.parametrize("hangs", ["source", "destination"])
def test_an_instance_that_copies_when_the_broker_is_killed_keeps_its_card(device_host: DeviceHost, hangs: str) -> None:
    transfer = Transfer(device_host, destination_card=1)
    copying: CardProcess = getattr(transfer, hangs)
    owners = transfer.owners
    owner = owners.pop({"source": "sender", "destination": "receiver"}[hangs])
    (other,) = owners.values()
    transfer.hang(copying)
    transfer.broker.kill()
    eventually(lambda: not is_alive(other))  # its borrower has let go
    broker = device_host.start_broker(settings=SETTINGS)
    eventually(lambda: owner in left_behind(broker), within=60)
    assert is_alive(owner)
    assert has_mapped(copying)
    copying.process.send_signal(signal.SIGCONT)  # and it copies what it was asked for
    failed = transfer.answer(60)
    assert (failed.error, failed.touched, failed.quiesced) == ("TransferFailed", True, True)
    eventually(lambda: not is_alive(owner))
    assert not any(map(has_mapped, (transfer.source, transfer.destination)))
    assert device_host.cann.used_bytes() == transfer.used
    eventually(lambda: [one.is_staged for one in broker.publications()] == [True], within=60)
    again = transfer.destination.call(instance.acquire, "model")
    assert (again.error, again.path) == ("", "staged")
    assert transfer.destination.call(instance.digest, "model") == transfer.source.call(instance.digest, "model")
    assert device_host.cann.violations() == []


def test_a_borrower_that_dies_after_the_broker_ends_the_owner_of_the_buffer(device_host: DeviceHost) -> None:
    transfer = Transfer(device_host, destination_card=1)
    owner = transfer.owners["sender"]
    transfer.hang(transfer.source)
    transfer.broker.kill()
    assert transfer.answer(60).error == "TransferFailed"
    device_host.start_broker(settings=SETTINGS)
    assert is_alive(owner)
    transfer.source.kill()
    eventually(lambda: not is_alive(owner))


def test_a_broker_that_stops_leaves_the_buffer_of_an_instance_that_hangs(device_host: DeviceHost) -> None:
    transfer = Transfer(device_host, destination_card=1)
    owners = transfer.owners
    transfer.hang(transfer.source)
    broker = transfer.broker.process
    assert broker is not None
    broker.send_signal(signal.SIGTERM)
    broker.send_signal(signal.SIGINT)  # at once
    assert transfer.answer(60).error != ""
    assert broker.wait(60) == 0
    eventually(lambda: not is_alive(owners["receiver"]))
    assert is_alive(owners["sender"])
    transfer.source.process.send_signal(signal.SIGCONT)
    eventually(lambda: not is_alive(owners["sender"]))
    assert len(transfer.source.call(instance.digest, "model")) > 0, "it can still use its card"
    assert device_host.cann.violations() == []


def test_a_sender_that_does_not_unmap_a_region_lives_until_its_buffers_are_back(scene: CardScene) -> None:
    region, borrower = scene.own(0, 2 * MIB, seed=3), scene.start_process()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    async def scenario(cards: CardSupervisor) -> None:
        buffer = await cards.make_staging_buffer(card_name(0), 2 * MIB)
        await cards.lend_staging_buffer(card_name(0), buffer.region_id, ours.fileno())
        borrower.call(acl.set_device, 0)
        address = borrower.call(acl.import_key, bytes.fromhex(buffer.export_key))
        sender = cards.health[0].sender_pid
        os.kill(sender, signal.SIGSTOP)
        unregistering = asyncio.create_task(cards.unregister(region.card, region.region.region_id))
        await until(lambda: sender in cards.health[0].retiring_pids)  # it is not used for anything else
        assert not unregistering.done()
        assert is_alive(sender)
        borrower.call(acl.write, address, b"still here")
        borrower.call(acl.close_key, bytes.fromhex(buffer.export_key))
        await cards.close_staging_buffer(card_name(0), buffer.region_id)
        await unregistering
        assert not is_alive(sender)

    with ours, theirs:
        scene.run(scenario, region, import_seconds=2.0)


def test_the_double_breaks_the_card_of_a_process_that_uses_a_buffer_whose_owner_ended(cann_host: CannHost) -> None:
    """What the other tests rely on."""
    owner, borrower = CardProcess(cann_host), CardProcess(cann_host)
    try:
        owner.call(acl.set_device, 0)
        key = owner.call(acl.export, owner.call(acl.malloc, 2 * MIB), 2 * MIB, any_process=True)
        borrower.call(acl.set_device, 0)
        address = borrower.call(acl.import_key, key)
        borrower.call(acl.write, address, b"fine")
        owner.kill()
        with pytest.raises(acl.AclError):
            borrower.call(acl.write, address, b"gone")
        with pytest.raises(acl.AclError):
            borrower.call(acl.malloc, MIB)
    finally:
        owner.close()
        borrower.close()
