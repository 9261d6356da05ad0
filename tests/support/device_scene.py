"""One broker, one model, instances on cards that offer it or have room for it."""

from __future__ import annotations

from collections.abc import Sequence

from doubles.cann.control import CannHost, card_name
from support import device_instance as instance
from support.broker_process import BrokerProcess
from support.card_process import CardProcess
from support.device_host import DeviceHost, cards
from support.device_instance import Tensor
from support.waiting import eventually

MIB = 1 << 20
SLOW = 2 * MIB
"""Bytes per second of a link on which the model does not arrive while a test looks."""
MODEL = [Tensor(f"layer{index}.weight", (4, 1024, 1024)) for index in range(4)]


class Scene:
    """A broker; instances by name, each with the model on a card."""

    def __init__(self, host: DeviceHost, **settings: str) -> None:
        self.host = host
        self.cann: CannHost = host.cann
        self.broker: BrokerProcess = host.start_broker(settings=settings)

    def publisher(self, name: str, card: int) -> CardProcess:
        """One that offers the model."""
        process = self.receiver(name, card, seed=7)
        assert process.call(instance.publish, "model").error == ""
        return process

    def receiver(self, name: str, card: int, seed: int | None = None) -> CardProcess:
        """One that has the tensors."""
        process = self.host.start_instance(name)
        process.call(instance.create, "model", card, MODEL, seed)
        return process

    def warm_up(self, *between: CardProcess) -> None:
        """Communicators are set up, receivers are there: what follows is about bytes."""
        for process in between:
            assert process.call(instance.acquire, "model").error == ""

    def wait_until_moving(self, card: int) -> None:
        """A receiver of the card has begun to write."""
        eventually(lambda: any("pending_tasks" in self.cann.live(pid) for pid in self._receivers(card)))

    def _receivers(self, card: int) -> Sequence[int]:
        return cards(self.broker)[card_name(card)].receiver_pids
