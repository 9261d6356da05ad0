"""The NPUs of a host from the broker's start to its end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from support.asynchronous import on_a_loop
from weight_brokerd.cards.configuration import CardsConfiguration
from weight_brokerd.kinds.npu import kind as npu_kind


class SlowSupervisor:
    """One whose driver does not answer."""

    def __init__(self, *_: object) -> None:
        self.is_starting = asyncio.Event()
        self.is_closed = False
        self.health: list[Any] = []

    async def start(self) -> None:
        self.is_starting.set()
        await asyncio.Event().wait()

    async def close(self) -> None:
        self.is_closed = True


class NoWorker:
    """A datasystem worker that is not managed."""

    is_managed = False
    problem = ""

    async def close(self) -> None:
        """Nothing to end."""


async def connect() -> CardsConfiguration:
    return CardsConfiguration("127.0.0.1", 1)


@on_a_loop
async def test_a_broker_that_stops_while_it_looks_for_cards_closes_what_it_started() -> None:
    made: list[SlowSupervisor] = []

    def make(*arguments: object) -> SlowSupervisor:
        made.append(SlowSupervisor(*arguments))
        return made[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(npu_kind, "CardSupervisor", make)
        devices: Any = npu_kind.NpuDevices(connect, NoWorker(), object())  # type: ignore[arg-type]
        devices.start()
        async with asyncio.timeout(5):
            while not made:
                await asyncio.sleep(0)
            await made[0].is_starting.wait()
            await devices.close()
    assert made[0].is_closed
