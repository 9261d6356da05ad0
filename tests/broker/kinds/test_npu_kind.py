"""The NPUs of a host from the broker's start to its end."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from support.asynchronous import on_a_loop
from support.kinds import RecordedEvents, npu_kind
from support.scripted_cards import ScriptedCards
from weight_broker.layout import Layout, TensorSpec
from weight_brokerd.attach.stage import StagingConnections
from weight_brokerd.cards.configuration import CardsConfiguration
from weight_brokerd.cards.messages import ImportRegion
from weight_brokerd.dataplane.plane import MoveFailed, Place, PlaneName, StagedBy
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
    is_ready = True
    problem = ""

    async def start(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    async def settled(self) -> None:
        """At once."""

    async def look(self) -> None:
        """It is new enough."""

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


LAYOUT = Layout([TensorSpec("weight", "int8", (4096,), (1,), 4096)])


def place(name: str, card: str) -> Place:
    return Place("npu", card, (ImportRegion(name, 4096, export_key="6b"),), ((0, 0),))


SOURCE = place("source", "npu:0")
STAGED = Place("npu", "npu:1", stage=StagedBy("second", "s"))


async def ready(cards: ScriptedCards, *, peer_copy: bool) -> NpuKind:
    staging = StagingConnections(lambda _instance_id, _why: None)
    kind = npu_kind(cards, staging, RecordedEvents(), peer_copy=peer_copy)
    kind.start()
    await kind.ready()
    return kind


@pytest.mark.parametrize("peer_copy", [False, True])
@pytest.mark.parametrize(
    ("destination", "without", "with_peer_copy"),
    [
        (place("destination", "npu:0"), PlaneName.COPY, PlaneName.COPY),
        (place("destination", "npu:1"), PlaneName.DATASYSTEM, PlaneName.PEER_COPY),
        (STAGED, PlaneName.STAGED, PlaneName.STAGED),
    ],
    ids=["same card", "another card", "staged"],
)
@on_a_loop
async def test_cards_are_copied_between_where_that_is_offered(
    destination: Place, without: PlaneName, with_peer_copy: PlaneName, peer_copy: bool
) -> None:
    kind = await ready(ScriptedCards("npu:0", "npu:1"), peer_copy=peer_copy)
    assert kind.route(SOURCE, destination).name is (with_peer_copy if peer_copy else without)
    await kind.close()


@on_a_loop
async def test_a_pair_of_cards_that_refused_goes_through_the_datasystem_from_then_on() -> None:
    cards = ScriptedCards("npu:0", "npu:1", "npu:2")
    kind = await ready(cards, peer_copy=True)
    destination = place("destination", "npu:1")
    cards.peers_refused = {"source"}
    with pytest.raises(MoveFailed) as refused:
        await kind.route(SOURCE, destination).move(LAYOUT, SOURCE, destination, timeout=10.0, peer="transfer-1")
    assert refused.value.instead is not None
    await refused.value.instead.move(LAYOUT, SOURCE, destination, timeout=10.0, peer="transfer-1")
    assert kind.route(SOURCE, destination).name is PlaneName.DATASYSTEM
    assert kind.route(SOURCE, replace(destination, device_id="npu:2")).name is PlaneName.PEER_COPY
    await kind.close()
