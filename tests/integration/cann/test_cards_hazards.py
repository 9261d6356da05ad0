"""The engine's hazards (test_datasystem_hazards.py) do not reach those who use the cards.

H5 is in test_cards_deaths.py, with the half of H2 that an instance's death is; more of H9 is in test_cards_sizes.py.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import signal
from pathlib import Path

import pytest

from doubles.cann.control import Fault, card_name
from support import acl
from support.cards import CardScene, configuration, move, own, until
from weight_brokerd.cards import messages
from weight_brokerd.cards.child import engine as child_engine
from weight_brokerd.cards.child.main import THREADS
from weight_brokerd.cards.errors import CardRefused
from weight_brokerd.cards.events import Hooks
from weight_brokerd.cards.messages import Role
from weight_brokerd.cards.offers import OfferEnd, fresh_key
from weight_brokerd.cards.process import CardProcess as Child
from weight_brokerd.kinds.npu.supervisor import CardSupervisor

MIB = 1 << 20

pytestmark = pytest.mark.timeout(120)


def test_h1_no_process_is_on_both_ends(scene: CardScene) -> None:
    owned = scene.own(0, MIB)

    async def scenario() -> None:
        configured = configuration(scene.host, scene.worker)
        sender, receiver = await asyncio.gather(*(Child.start(role, 0, configured) for role in Role))
        with pytest.raises(CardRefused, match="a sender does not do Fetch"):
            await sender.ask(messages.Fetch("k", owned.blobs(), 1000))
        with pytest.raises(CardRefused, match="a receiver does not do Offer"):
            await receiver.ask(messages.Offer("k", owned.blobs()))
        await asyncio.gather(sender.stop(), receiver.stop())

    asyncio.run(scenario())


def test_h2_a_sender_killed_in_mid_transfer_costs_one_fetch_and_neither_a_minute_nor_the_memory(
    scene: CardScene,
) -> None:
    source, destination = scene.pair(24 * MIB)
    lost: list[str] = []

    async def scenario(cards: CardSupervisor) -> None:
        await cards.warm_up(card_name(1))
        scene.host.inject(Fault.SLOW_LINK, value=4 * MIB)
        key = fresh_key()
        await cards.offer(card_name(0), key, source.blobs())
        fetching = asyncio.create_task(
            cards.fetch(card_name(1), key, destination.blobs(), [destination.region], timeout=90)
        )
        await scene.until_moving(cards)
        os.kill(cards.health[0].sender_pid, signal.SIGKILL)
        await until(lambda: lost == [key])
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        scene.host.clear()
        await move(cards, source, destination, timeout=40)  # the engine's own time-out is a minute
        assert destination.digest() == source.digest()

    scene.run(scenario, source, hooks=Hooks(on_offers_lost=lambda keys, _: lost.extend(keys)))


def test_h3_a_slow_reader_gets_the_right_bytes_although_a_fast_one_is_done_and_withdrawn(scene: CardScene) -> None:
    source = scene.own(0, 16 * MIB, seed=3)
    fast, slow = scene.own(1, 16 * MIB), scene.own(2, 16 * MIB)
    expected = source.digest()

    async def scenario(cards: CardSupervisor) -> None:
        await asyncio.gather(cards.warm_up(card_name(1)), cards.warm_up(card_name(2)))
        scene.host.inject(Fault.SLOW_LINK, card=2, value=MIB // 4)
        slowly = asyncio.create_task(move(cards, source, slow))
        await scene.until_moving(cards, 2)
        await move(cards, source, fast)
        assert not slowly.done(), "they did not overlap"
        assert cards.health[0].offers == 1, "the slow reader is counted"
        scene.host.clear()
        await slowly
        assert cards.health[0].offers == 0
        source.fill(None)  # as an instance does when its retraction is answered: now nobody reads

    scene.run(scenario, source)
    assert fast.digest() == slow.digest() == expected


def test_h3_memory_that_is_taken_back_under_a_reader_is_unmapped_and_the_reader_is_not_told_of_a_success(
    scene: CardScene,
) -> None:
    source, destination = scene.pair(16 * MIB)
    other = own(source.process, 0, 2 * MIB, seed=4)
    lost: list[str] = []

    hooks = Hooks(on_offers_lost=lambda keys, _: lost.extend(keys))

    async def scenario(cards: CardSupervisor) -> None:
        await cards.warm_up(card_name(1))
        scene.host.inject(Fault.SLOW_LINK, value=4 * MIB)
        key = fresh_key()
        await cards.offer(card_name(0), key, source.blobs())
        fetching = asyncio.create_task(
            cards.fetch(card_name(1), key, destination.blobs(), [destination.region], timeout=30)
        )
        await scene.until_moving(cards)
        await cards.unregister(card_name(0), source.region.region_id)
        assert lost == [key]
        # The driver would refuse this if anybody had it open still.
        source.process.call(acl.close_key, bytes.fromhex(source.region.export_key))
        source.process.call(acl.free, source.address)
        assert not fetching.done()
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        scene.host.clear()
        assert (await cards.offer(card_name(0), fresh_key(), other.blobs())).seconds, (
            "what else is published is still there"
        )

    scene.run(scenario, source, other, hooks=hooks)


def test_h4_and_h7_transfers_of_the_same_memory_follow_each_other_without_a_stall_and_with_its_content_of_the_time(
    scene: CardScene,
) -> None:
    source = scene.own(0, 2 * MIB, seed=0)
    destinations = [scene.own(card, 2 * MIB) for card in (1, 2)]

    async def scenario(cards: CardSupervisor) -> None:
        for turn in range(5):
            source.fill(turn)
            for destination in destinations:
                await move(cards, source, destination, timeout=40)  # a stall is of a minute
                assert destination.digest() == source.digest()
        assert cards.health[0].offers == 0

    scene.run(scenario, source)


def test_h6_the_engine_is_asked_for_nothing_but_what_a_transfer_takes() -> None:
    """A question about a device key brings the worker down if its master is away."""
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(child_engine))) if isinstance(node, ast.Call)]
    asked = {
        call.args[0].value
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "_call" and isinstance(call.args[0], ast.Constant)
    }
    assert asked == {"init", "dev_mset", "dev_mget", "dev_local_delete"}
    others = [
        path
        for path in Path(child_engine.__file__).parent.glob("*.py")
        if path.name != Path(child_engine.__file__).name
    ]
    assert [path.name for path in others if "yr.datasystem" in path.read_text()] == []


def test_h8_the_first_requests_to_a_fresh_process_may_come_all_at_once(scene: CardScene) -> None:
    source = scene.own(0, 2 * MIB, seed=3)

    async def scenario(cards: CardSupervisor) -> None:
        keys = [fresh_key() for _ in range(THREADS)]
        await asyncio.gather(*(cards.offer(card_name(0), key, source.blobs()) for key in keys))
        await asyncio.gather(*(cards.withdraw(card_name(0), key, OfferEnd.UNREAD) for key in keys))
        assert cards.health[0].retiring_pids == ()

    # The hazard costs 15 to 61 s: more than a request may take here.
    scene.run(scenario, source, request_seconds=14.0)


def test_h9_blobs_that_the_engine_merges_go_to_cards_other_than_the_first(scene: CardScene) -> None:
    source, destination = scene.own(2, 4 * MIB, seed=3), scene.own(3, 4 * MIB)
    spans = [(offset, 30_000) for offset in range(0, 4 * MIB - 30_000, 40_000)]

    async def scenario(cards: CardSupervisor) -> None:
        await move(cards, source, destination, [(source.blobs(*spans), destination.blobs(*spans))])

    scene.run(scenario, source)
    for offset, size in spans[::20]:
        assert destination.read(offset, size) == source.read(offset, size)


def test_h11_every_thread_of_a_card_process_has_its_card(scene: CardScene) -> None:
    source = scene.own(1, 2 * MIB, seed=3)

    async def scenario(cards: CardSupervisor) -> None:
        keys = [fresh_key() for _ in range(40)]
        packed = source.blobs((0, 100))._replace(blobs=(source.blobs((0, 100)).blobs[0]._replace(size=2 * MIB),))
        await asyncio.gather(*(cards.offer(card_name(1), key, packed) for key in keys))
        (figures,) = (await cards.figures(card_name(1))).values()
        assert (figures.keys, figures.staging_bytes) == (40, 80 * MIB)
        await asyncio.gather(*(cards.withdraw(card_name(1), key, OfferEnd.UNREAD) for key in [*keys, *keys]))
        (figures,) = (await cards.figures(card_name(1))).values()
        assert (figures.keys, figures.staging_bytes) == (0, 0)
        assert cards.health[0].retiring_pids == ()

    scene.run(scenario, source)


def test_h10_and_h12_the_engine_is_in_the_card_processes_and_not_in_the_front(scene: CardScene) -> None:
    """Its threads spin, and some of its calls hold the interpreter."""
    source, destination = scene.pair(2 * MIB)

    def has_engine(pid: int) -> bool:
        return "libdatasystem" in Path(f"/proc/{pid}/maps").read_text()

    async def scenario(cards: CardSupervisor) -> None:
        await move(cards, source, destination)
        pids = cards.health[0].sender_pid, *cards.health[1].receiver_pids
        assert [has_engine(pid) for pid in (*pids, os.getpid())] == [True, True, False]

    scene.run(scenario, source)


def test_h12_a_process_whose_fetch_hangs_goes_on_answering(scene: CardScene) -> None:
    source, destination = scene.pair(24 * MIB)

    async def scenario(cards: CardSupervisor) -> None:
        await cards.warm_up(card_name(1))
        scene.host.inject(Fault.SLOW_LINK, value=MIB // 2)
        moving = asyncio.create_task(move(cards, source, destination))
        await scene.until_moving(cards)
        (figures,) = (await cards.figures(card_name(1))).values()
        assert figures.imports == 1
        assert not moving.done(), "it was over before"
        scene.host.clear()
        await moving

    scene.run(scenario, source)
