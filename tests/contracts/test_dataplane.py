"""What every data plane promises, tried on each with cards that do what a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from support.asynchronous import on_a_loop
from support.kinds import ServingConnections
from support.scripted_cards import ScriptedCards
from weight_broker.layout import Layout, TensorSpec
from weight_brokerd.cards.errors import CardTimeout
from weight_brokerd.cards.messages import ImportRegion
from weight_brokerd.core.model import FailureCause
from weight_brokerd.dataplane.copy import CopyPlane
from weight_brokerd.dataplane.datasystem import DatasystemPlane
from weight_brokerd.dataplane.plane import DataPlane, MoveFailed, Place, PlaneName, StagedBy
from weight_brokerd.dataplane.staged import StagedPlane

SIZE = 4096
LAYOUT = Layout([TensorSpec("weight", "int8", (SIZE,), (1,), SIZE)])
EMPTY = Layout([TensorSpec("empty", "int8", (0,), (1,), 0)])


@dataclass
class Harness:
    """A plane and its world."""

    plane: DataPlane
    cards: ScriptedCards
    staging: ServingConnections
    source: Place
    destination: Place

    async def until_moving(self) -> None:
        """Bytes are under way."""
        for _ in range(100_000):
            if self.cards.moving or self.staging.moving:
                return
            await asyncio.sleep(0)
        raise AssertionError("nothing moves")

    async def move(self, layout: Layout = LAYOUT, timeout: float = 10.0) -> dict[str, float]:
        seconds = await self.plane.move(layout, self.source, self.destination, timeout=timeout, peer="transfer-1")
        return dict(seconds)


def mapped(name: str, card: str) -> Place:
    return Place("npu", card, (ImportRegion(name, SIZE, export_key="6b"),), ((0, 0),))


def staged(name: str, card: str) -> Place:
    return Place("npu", card, stage=StagedBy(name, name))


def copy() -> Harness:
    cards = ScriptedCards("npu:0")
    plane = CopyPlane(cards, may_stage=True)
    return Harness(plane, cards, ServingConnections(), mapped("source", "npu:0"), mapped("destination", "npu:0"))


def datasystem() -> Harness:
    cards = ScriptedCards("npu:0", "npu:1")
    plane = DatasystemPlane(cards, may_stage=True)
    return Harness(plane, cards, ServingConnections(), mapped("source", "npu:0"), mapped("destination", "npu:1"))


def through_buffers(source: Place, destination: Place) -> Harness:
    cards = ScriptedCards("npu:0", "npu:1")
    staging = ServingConnections("source", "destination")
    inner = DatasystemPlane(cards, may_stage=True)
    plane = StagedPlane(cards, inner, staging, staging_bytes=4 << 20, answer_seconds=5.0)
    return Harness(plane, cards, staging, source, destination)


def staged_source() -> Harness:
    return through_buffers(staged("source", "npu:0"), mapped("destination", "npu:1"))


def staged_destination() -> Harness:
    return through_buffers(mapped("source", "npu:0"), staged("destination", "npu:1"))


def staged_both() -> Harness:
    return through_buffers(staged("source", "npu:0"), staged("destination", "npu:0"))


PLANES = [copy, datasystem, staged_source, staged_destination, staged_both]
MAPS_DESTINATION = [copy, datasystem, staged_source]


@pytest.fixture(params=PLANES, ids=lambda make: make.__name__)
def make(request: pytest.FixtureRequest) -> Callable[[], Harness]:
    found: Callable[[], Harness] = request.param
    return found


def test_every_plane_is_tried() -> None:
    assert {make().plane.name for make in PLANES} == set(PlaneName) - {PlaneName.HOST}


@on_a_loop
async def test_what_has_arrived_is_told_with_the_seconds_of_its_phases(make: Callable[[], Harness]) -> None:
    host = make()
    assert set(await host.move()) == {"map", "transfer"}
    assert host.cards.moving == 0
    assert host.cards.buffers == set()


@on_a_loop
async def test_what_has_no_content_is_there_at_once(make: Callable[[], Harness]) -> None:
    host = make()
    await host.move(EMPTY)
    assert host.cards.moved == []


@on_a_loop
async def test_a_cancelled_movement_writes_no_more(make: Callable[[], Harness]) -> None:
    host = make()
    host.cards.gate = asyncio.Event()
    host.staging.gate = host.cards.gate
    moving = asyncio.create_task(host.move())
    async with asyncio.timeout(10):
        await host.until_moving()
        moving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await moving
    assert host.cards.moving == host.staging.moving == 0
    assert host.cards.buffers == set()


@on_a_loop
async def test_a_failure_says_whose_it_is_and_how_far_the_bytes_came(make: Callable[[], Harness]) -> None:
    host = make()
    host.cards.failure = CardTimeout("its receiver was killed", touched=True, quiesced=False)
    host.staging.instances.discard("source")
    with pytest.raises(MoveFailed) as failed:
        await host.move()
    assert failed.value.cause is FailureCause.SOURCE_UNREACHABLE
    assert not failed.value.needs_staging


@pytest.mark.parametrize("make", MAPS_DESTINATION, ids=lambda make: make.__name__)
@on_a_loop
async def test_memory_of_the_receiver_that_cannot_be_mapped_may_be_staged(make: Callable[[], Harness]) -> None:
    host = make()
    host.cards.refused = {"destination"}
    with pytest.raises(MoveFailed, match="507899") as failed:
        await host.move()
    error = failed.value
    assert (error.cause, error.needs_staging) == (FailureCause.RECEIVER, True)
    assert (error.touched, error.quiesced) == (False, True)
    assert host.cards.buffers == set()


@on_a_loop
async def test_memory_of_the_source_that_cannot_be_mapped_is_the_sources_failure() -> None:
    host = copy()
    host.cards.refused = {"source"}
    with pytest.raises(MoveFailed, match="507899") as failed:
        await host.move()
    assert (failed.value.cause, failed.value.needs_staging) == (FailureCause.SOURCE_UNREACHABLE, False)


@on_a_loop
async def test_a_plane_that_may_not_stage_does_not_ask_for_it() -> None:
    for make, plane in ((copy, CopyPlane), (datasystem, DatasystemPlane)):
        host = make()
        host.plane = plane(host.cards)
        host.cards.refused = {"destination"}
        with pytest.raises(MoveFailed) as failed:
            await host.move()
        assert (failed.value.cause, failed.value.needs_staging) == (FailureCause.RECEIVER, False)


@on_a_loop
async def test_an_instance_that_does_not_copy_for_itself_is_the_receivers_failure() -> None:
    host = staged_destination()
    host.staging.instances.discard("destination")
    with pytest.raises(MoveFailed) as failed:
        await host.move()
    assert (failed.value.cause, failed.value.quiesced) == (FailureCause.RECEIVER, True)
