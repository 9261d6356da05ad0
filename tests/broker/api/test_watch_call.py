"""The Watch call of a broker with very much in it: nobody else waits while its state is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from support.control_room import ControlRoom
from weight_broker.key import WeightSetKey
from weight_broker.layout import Layout, TensorSpec
from weight_broker.v1 import inspection_service_pb2 as pb
from weight_broker.v1 import resources_pb2
from weight_brokerd.api.incoming.turns import Turns
from weight_brokerd.api.inspection import CHANGES_PER_MESSAGE, CHANGES_PER_STEP, InspectionServicer
from weight_brokerd.api.messages import Messages
from weight_brokerd.attach.peer import PeerCredentials
from weight_brokerd.control.control import Control
from weight_brokerd.core.publications import Offer
from weight_brokerd.core.weight_sets import WeightSetRecord
from weight_brokerd.dataplane.plane import Place
from weight_brokerd.kinds.published import PublishedMemory

EMPTY = Layout([TensorSpec("empty", "int8", (0,), (1,), 0)])
MANY = 10_000


class CountingMessages(Messages):
    """Counts the weight sets that are built before anybody else gets a turn."""

    def __init__(self, control: Control) -> None:
        super().__init__(control)
        self.since_turn = 0
        self.most = 0

    def weight_set(self, record: WeightSetRecord) -> resources_pb2.WeightSet:
        self.since_turn += 1
        self.most = max(self.most, self.since_turn)
        return super().weight_set(record)

    async def take_turns(self) -> None:
        """Everybody else."""
        while True:
            self.since_turn = 0
            await asyncio.sleep(0)


class CallContext:
    """What Watch needs of a call: it never ends."""

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        pass


class Host:
    """A control plane with one instance that publishes."""

    def __init__(self) -> None:
        self.control = ControlRoom().control
        self.messages = CountingMessages(self.control)
        self.instance_id = self.control.sessions.attach(PeerCredentials(1, 0, 0, frozenset()), "one", "").instance_id

    async def publish(self, model: str) -> str:
        offer = Offer(WeightSetKey(model), EMPTY, self.instance_id, "cpu", "", 0, f"request {model}")
        return (await self.control.publishing.publish(offer, PublishedMemory(Place("cpu", ""), b""))).publication_id

    def watch(self) -> AsyncIterator[pb.WatchResponse]:
        context: Any = CallContext()
        return InspectionServicer(self.control, self.messages, Turns()).Watch(pb.WatchRequest(), context)


def models(responses: list[pb.WatchResponse]) -> set[str]:
    """What a reader knows after these."""
    known: dict[str, str] = {}
    for response in responses:
        if response.snapshot_start:
            known.clear()
        for change in response.changes:
            if change.HasField("weight_set"):
                known[change.weight_set.weight_set_id] = change.weight_set.key.model
            known.pop(change.removed_weight_set_id, None)
    return set(known.values())


def test_others_get_their_turn_while_ten_thousand_publications_are_told() -> None:
    async def run() -> None:
        host = Host()
        for number in range(MANY):
            await host.publish(f"{number}")
        others = asyncio.create_task(host.messages.take_turns())
        stream, told = host.watch(), [pb.WatchResponse()]
        while not told[-1].snapshot_end:  # as quick as a reader can be: reading itself gives nobody a turn
            told.append(await anext(stream))
        assert len(models(told)) == MANY
        assert 0 < host.messages.most <= CHANGES_PER_STEP
        assert max(len(one.changes) for one in told) == CHANGES_PER_MESSAGE
        assert [one.snapshot_start for one in told[1:]] == [True] + [False] * (len(told) - 2)

        for number in range(MANY // 2):  # and while as many changes are told
            await host.publish(f"{number}-again")
        changes = [await anext(stream) for _ in range(MANY // 2 // CHANGES_PER_MESSAGE)]
        assert len(models(changes)) == MANY // 2
        assert not any(one.snapshot for one in changes)
        assert host.messages.most <= CHANGES_PER_STEP
        others.cancel()
        host.control.close()

    asyncio.run(run())


def test_what_changes_while_the_state_is_told_follows_it() -> None:
    async def run() -> None:
        host = Host()
        published = [await host.publish(f"{number}") for number in range(2 * CHANGES_PER_MESSAGE)]
        stream = host.watch()
        told = [await anext(stream)]
        host.control.publishing.evict("", published[0])  # told already
        host.control.publishing.evict("", published[-1])  # not yet
        await host.publish("new")
        while not told[-1].snapshot_end:
            told.append(await anext(stream))
        changes = [change.WhichOneof("change") for one in told for change in one.changes]
        assert "removed_weight_set_id" not in changes, "the full state is what there is"
        told.append(await anext(stream))
        assert not told[-1].snapshot
        assert models(told) == {"new", *(f"{number}" for number in range(1, len(published) - 1))}
        host.control.close()

    asyncio.run(run())


def test_a_state_whose_last_things_go_while_it_is_told_still_has_an_end() -> None:
    async def run() -> None:
        host = Host()
        published = [await host.publish(f"{number}") for number in range(CHANGES_PER_MESSAGE + 10)]
        stream = host.watch()
        first = await anext(stream)
        for publication_id in published[CHANGES_PER_MESSAGE:]:
            host.control.publishing.evict("", publication_id)
        host.control.sessions.departed(host.instance_id, "test")
        last = await anext(stream)
        assert (first.snapshot_start, first.snapshot_end) == (True, False)
        assert (last.snapshot, last.snapshot_start, last.snapshot_end) == (True, False, True)
        assert not last.changes
        assert not models([first, last, await anext(stream), await anext(stream)])
        host.control.close()

    asyncio.run(run())
