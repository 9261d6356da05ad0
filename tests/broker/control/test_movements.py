"""What the broker moves into one acquisition's memory is one thing at a time, and nobody is told to use it before."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace

import pytest

from weight_broker.key import WeightSetKey
from weight_broker.layout import Layout, TensorSpec
from weight_brokerd.cards.messages import ImportRegion
from weight_brokerd.control.movements import Movements
from weight_brokerd.core.model import DataPlane, FailureCause, TransferPath
from weight_brokerd.core.publications import Publication
from weight_brokerd.core.sources import Holder
from weight_brokerd.core.transfers import Transfer
from weight_brokerd.dataplane.plane import MoveFailed, Place, PlaneName, StagedBy

LAYOUT = Layout([TensorSpec("weight", "int8", (8,), (1,), 8)])
PLACE = Place("npu", "npu:0", (), ((0, 0),))
SOURCE = Publication(
    "publication-1",
    WeightSetKey("model"),
    LAYOUT,
    generation=1,
    holder=Holder("host", "a", "a"),
    device_kind="npu",
    device_id="npu:1",
    reader_limit=4,
    published_at=0.0,
    request_id="r",
    fencing_token=0,
)


def transfer(number: int, acquisition_id: str = "acquisition-1") -> Transfer:
    return Transfer(number, acquisition_id, SOURCE, Holder("host", "b"), TransferPath.COPY, DataPlane.DATASYSTEM, 0.0)


@dataclass
class Plane:
    """Moves as a test says: what `script` does for the n-th movement. Notes who writes at a time."""

    script: Callable[[str], Awaitable[Mapping[str, float]]]
    name: PlaneName = PlaneName.DATASYSTEM
    writing: int = 0
    most_writing: int = 0
    begun: list[str] = field(default_factory=list)

    async def move(
        self, layout: Layout, source: Place, destination: Place, *, timeout: float, peer: str
    ) -> Mapping[str, float]:
        self.begun.append(peer)
        self.writing += 1
        self.most_writing = max(self.most_writing, self.writing)
        try:
            return await self.script(peer)
        finally:
            self.writing -= 1


@dataclass
class Events:
    """How movements ended."""

    moved_ids: list[str] = field(default_factory=list)
    staged_ids: list[str] = field(default_factory=list)
    routes: list[DataPlane] = field(default_factory=list)
    failures: list[tuple[str, bool, bool]] = field(default_factory=list)
    on_failure: Callable[[Transfer], None] = lambda _: None

    def moved(self, transfer: Transfer, seconds: Mapping[str, float]) -> None:
        self.moved_ids.append(transfer.transfer_id)

    def routed(self, transfer: Transfer, data_plane: DataPlane) -> None:
        self.routes.append(data_plane)

    def staged(self, transfer: Transfer) -> None:
        self.staged_ids.append(transfer.transfer_id)

    def not_moved(self, transfer: Transfer, failure: MoveFailed) -> None:
        self.failures.append((transfer.transfer_id, failure.touched, failure.quiesced))
        self.on_failure(transfer)


def scene(script: Callable[[str], Awaitable[Mapping[str, float]]]) -> tuple[Movements, Plane, Events]:
    plane, events = Plane(script), Events()
    return Movements(lambda _source, _destination: plane), plane, events


def start(movements: Movements, moved: Transfer, events: Events) -> None:
    movements.start(moved, PLACE, PLACE, timeout=10.0, events=events)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0)
    pytest.fail("it does not come")


async def takes_a_while_to_end(_: str) -> Mapping[str, float]:
    """As a receiver that is killed: its end is awaited."""
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        await asyncio.sleep(0.05)
        raise
    return {}


def test_what_was_moved_is_told_once_and_touched() -> None:
    async def at_once(_: str) -> Mapping[str, float]:
        return {"transfer": 1.0}

    async def run() -> None:
        movements, _, events = scene(at_once)
        start(movements, transfer(1), events)
        await movements.settled("acquisition-1")
        assert events.moved_ids == ["transfer-1"]
        assert movements.outcome("acquisition-1") == (True, True)
        await movements.forget("acquisition-1")
        assert movements.outcome("acquisition-1") == (False, True)

    asyncio.run(run())


def test_the_next_source_begins_when_the_one_before_has_stopped_writing() -> None:
    async def run() -> None:
        killed = asyncio.Event()

        async def ends_once_it_is_killed(_: str) -> Mapping[str, float]:
            try:
                await asyncio.sleep(600)
            finally:
                await killed.wait()
            return {}

        movements, plane, events = scene(ends_once_it_is_killed)
        first, second, third = transfer(1), transfer(2), transfer(3)
        start(movements, first, events)
        await until(lambda: plane.writing == 1)
        movements.stop(first)
        start(movements, second, events)
        movements.stop(second)  # it never began
        start(movements, third, events)
        assert movements.is_moving("acquisition-1")
        for _ in range(100):
            await asyncio.sleep(0)
        assert plane.begun == ["transfer-1"], "the killed receiver may still write"
        killed.set()
        await until(lambda: plane.begun == ["transfer-1", "transfer-3"])
        assert plane.most_writing == 1
        await movements.forget("acquisition-1")
        assert plane.writing == 0
        assert (events.moved_ids, events.failures) == ([], []), "nobody wants to hear of what was stopped"

    asyncio.run(run())


def test_a_memory_that_somebody_may_write_to_is_never_filled_again() -> None:
    async def clings(_: str) -> Mapping[str, float]:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise MoveFailed("held", cause=FailureCause.RECEIVER, touched=True, quiesced=False) from None
        return {}

    async def run() -> None:
        movements, plane, events = scene(clings)
        first = transfer(1)
        start(movements, first, events)
        await until(lambda: plane.writing == 1)
        movements.stop(first)
        start(movements, transfer(2), events)
        await movements.settled("acquisition-1")
        assert plane.begun == ["transfer-1"]
        assert events.failures == [("transfer-2", True, False)]
        assert movements.outcome("acquisition-1") == (True, False)

    asyncio.run(run())


@pytest.mark.parametrize("touched", [False, True])
def test_a_failure_is_told_with_what_it_touched_and_may_be_answered_with_the_next_source(touched: bool) -> None:
    async def first_fails(peer: str) -> Mapping[str, float]:
        if peer == "transfer-1":
            raise MoveFailed("gone", cause=FailureCause.SOURCE_UNREACHABLE, touched=touched)
        return {}

    async def run() -> None:
        movements, _, events = scene(first_fails)

        def failed(ended: Transfer) -> None:
            movements.stop(ended)  # the core ends the transfer and grants another one, in this very step
            assert not movements.is_moving("acquisition-1"), "the one that tells has ended"
            start(movements, transfer(2), events)

        events.on_failure = failed
        start(movements, transfer(1), events)
        await until(lambda: events.moved_ids == ["transfer-2"])
        assert events.failures == [("transfer-1", touched, True)]

    asyncio.run(run())


def test_a_defect_of_a_data_plane_is_a_failure_of_the_transfer() -> None:
    async def breaks(_: str) -> Mapping[str, float]:
        raise KeyError("text that is nobody's business")

    async def run() -> None:
        movements, _, events = scene(breaks)
        start(movements, transfer(1), events)
        await movements.settled("acquisition-1")
        assert events.failures == [("transfer-1", True, True)]

    asyncio.run(run())


def test_acquisitions_do_not_wait_for_each_other_and_all_end_with_the_broker() -> None:
    async def run() -> None:
        movements, plane, events = scene(takes_a_while_to_end)
        for number in range(3):
            start(movements, transfer(number, f"acquisition-{number}"), events)
        await until(lambda: plane.writing == 3)
        await movements.close()
        assert plane.writing == 0

    asyncio.run(run())


def test_memory_is_left_when_what_was_stopped_has_ended() -> None:
    async def run() -> None:
        movements, plane, events = scene(takes_a_while_to_end)
        first = transfer(1)
        start(movements, first, events)
        await until(lambda: plane.writing == 1)
        movements.stop(first)
        assert plane.writing == 1
        await movements.readers_gone(SOURCE)
        assert plane.writing == 0
        await movements.readers_gone(SOURCE)

    asyncio.run(run())


def both(owner: str = "b") -> Place:
    """A receiver that may be mapped and offers to copy."""
    return replace(PLACE, regions=(ImportRegion("r", 8),), stage=StagedBy(owner, "s"))


@pytest.mark.parametrize("touched", [False, True])
def test_what_needs_staging_is_moved_again_by_the_staged_route(touched: bool) -> None:
    async def refuses_first(_: str) -> Mapping[str, float]:
        if len(plane.begun) == 1:
            raise MoveFailed("507899", cause=FailureCause.RECEIVER, touched=touched, needs_staging=True)
        return {"transfer": 1.0}

    routes: list[tuple[bool, bool]] = []
    plane, events = Plane(refuses_first), Events()

    def route(source: Place, destination: Place) -> Plane:
        routes.append((source.is_staged, destination.is_staged))
        return plane

    async def run() -> None:
        movements = Movements(route)
        movements.start(transfer(1), PLACE, both(), timeout=10.0, events=events)
        await movements.settled("acquisition-1")
        assert routes == [(False, False), (False, True)]
        assert (events.staged_ids, events.moved_ids, events.failures) == (["transfer-1"], ["transfer-1"], [])

    asyncio.run(run())


def test_the_plane_that_a_refusal_names_moves_the_bytes_in_the_same_transfer() -> None:
    async def refuses(_: str) -> Mapping[str, float]:
        raise MoveFailed("507899", cause=FailureCause.SOURCE_UNREACHABLE, touched=False, instead=other)

    async def at_once(_: str) -> Mapping[str, float]:
        return {"transfer": 1.0}

    other = Plane(at_once)
    first, events = Plane(refuses, PlaneName.PEER_COPY), Events()

    async def run() -> None:
        movements = Movements(lambda _source, _destination: first)
        start(movements, transfer(1), events)
        await movements.settled("acquisition-1")
        assert (first.begun, other.begun) == (["transfer-1"], ["transfer-1"])
        assert events.routes == [DataPlane.PEER_COPY, DataPlane.DATASYSTEM]
        assert (events.moved_ids, events.failures) == (["transfer-1"], [])

    asyncio.run(run())


def test_a_transfer_that_is_stopped_while_it_is_refused_moves_nothing() -> None:
    async def refuses(_: str) -> Mapping[str, float]:
        movements.stop(stopped)
        raise MoveFailed("507899", cause=FailureCause.SOURCE_UNREACHABLE, touched=False, instead=other)

    stopped, other = transfer(1), Plane(refuses)
    movements, _, events = scene(refuses)

    async def run() -> None:
        start(movements, stopped, events)
        await movements.settled("acquisition-1")
        assert (other.begun, events.moved_ids, events.failures) == ([], [], [])

    asyncio.run(run())


@pytest.mark.parametrize(
    ("destination", "quiesced"), [(both(), False), (PLACE, True)], ids=["somebody may write", "nobody copies"]
)
def test_what_cannot_be_staged_fails_as_it_is(destination: Place, quiesced: bool) -> None:
    async def refuses(_: str) -> Mapping[str, float]:
        raise MoveFailed("507899", cause=FailureCause.RECEIVER, touched=False, quiesced=quiesced, needs_staging=True)

    async def run() -> None:
        movements, plane, events = scene(refuses)
        movements.start(transfer(1), PLACE, destination, timeout=10.0, events=events)
        await movements.settled("acquisition-1")
        assert (plane.begun, events.staged_ids) == (["transfer-1"], [])
        assert events.failures == [("transfer-1", False, quiesced)]

    asyncio.run(run())
