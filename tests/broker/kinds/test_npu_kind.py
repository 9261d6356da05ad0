"""The NPUs of a host from the broker's start to its end."""

from __future__ import annotations

import asyncio
from typing import Any

from support.asynchronous import on_a_loop
from support.kinds import RecordedEvents
from weight_brokerd.attach.stage import StagingConnections
from weight_brokerd.cards.configuration import CardsConfiguration
from weight_brokerd.kinds.npu.kind import NpuKind


class SlowSupervisor:
    """One whose driver does not answer."""

    def __init__(self) -> None:
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

    async def start(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    async def close(self) -> None:
        """Nothing to end."""


async def connect() -> CardsConfiguration:
    return CardsConfiguration("127.0.0.1", 1)


@on_a_loop
async def test_a_broker_that_stops_while_it_looks_for_cards_closes_what_it_started() -> None:
    made: list[SlowSupervisor] = []
    is_made = asyncio.Event()

    def make(*_: object) -> Any:
        made.append(SlowSupervisor())
        is_made.set()
        return made[-1]

    kind = NpuKind(
        connect, NoWorker(), StagingConnections(lambda _instance_id, _why: None), RecordedEvents(), supervise=make
    )
    kind.start()
    async with asyncio.timeout(5):
        await is_made.wait()
        await made[0].is_starting.wait()
        await kind.close()
    assert made[0].is_closed
