"""A fetch maps its destination while its key is reserved at the source: what happens if either of them fails."""

from __future__ import annotations

import asyncio

import pytest

from doubles.cann.control import Fault, card_name
from support.cards import CardScene, Owned, move, own
from weight_brokerd.cards.errors import CardRefused, CardTimeout
from weight_brokerd.cards.offers import fresh_key
from weight_brokerd.cards.receivers import Reserve
from weight_brokerd.kinds.npu.supervisor import CardSupervisor

MIB = 1 << 20

pytestmark = pytest.mark.timeout(120)


async def assert_untouched(cards: CardSupervisor, receiver: int) -> None:
    """The receiver is the same as before, and has nothing mapped."""
    assert cards.health[1].receiver_pids == (receiver,)
    assert (await cards.figures(card_name(1)))[receiver].imports == 0


async def warm(cards: CardSupervisor) -> int:
    """The pid of the receiver of card 1."""
    await cards.warm_up(card_name(1))
    (receiver,) = cards.health[1].receiver_pids
    return receiver


def test_the_key_is_reserved_while_the_destination_is_mapped(scene: CardScene) -> None:
    source, destination = scene.pair(2 * MIB)

    async def scenario(cards: CardSupervisor) -> None:
        receiver = await warm(cards)
        reserving, release, key = asyncio.Event(), asyncio.Event(), fresh_key()

        async def reserve() -> None:
            reserving.set()
            await release.wait()
            await cards.offer(card_name(0), key, source.blobs())

        fetching = asyncio.create_task(
            cards.fetch(card_name(1), key, destination.blobs(), [destination.region], timeout=60, reserve=reserve)
        )
        await reserving.wait()
        for _ in range(1000):
            if (await cards.figures(card_name(1)))[receiver].imports:
                break
            await asyncio.sleep(0.01)
        else:
            pytest.fail("it is not mapped")
        assert not any(destination.read(0, 4096)), "nothing moves before the source has said yes"
        release.set()
        await fetching
        assert destination.digest() == source.digest()

    scene.run(scenario, source)


def test_a_source_that_refuses_ends_the_fetch_in_its_own_words_and_costs_no_receiver(scene: CardScene) -> None:
    source, destination = scene.pair(2 * MIB)

    async def refuse() -> None:
        raise CardRefused("the source retracts")

    async def scenario(cards: CardSupervisor) -> None:
        receiver = await warm(cards)
        with pytest.raises(CardRefused, match="the source retracts") as caught:
            await fetch(cards, destination, refuse)
        assert (caught.value.touched, caught.value.quiesced) == (False, True)
        await assert_untouched(cards, receiver)
        await move(cards, source, destination)

    scene.run(scenario, source)


def test_a_source_that_does_not_answer_in_time_costs_no_receiver(scene: CardScene) -> None:
    destination = scene.own(1, 2 * MIB)
    was_cancelled = asyncio.Event()

    async def hang() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            was_cancelled.set()

    async def scenario(cards: CardSupervisor) -> None:
        receiver = await warm(cards)
        with pytest.raises(CardTimeout, match="did not offer its memory in time") as caught:
            await fetch(cards, destination, hang, timeout=3)
        assert (caught.value.touched, caught.value.quiesced) == (False, True)
        assert was_cancelled.is_set()
        await assert_untouched(cards, receiver)

    scene.run(scenario)


def test_memory_that_cannot_be_mapped_cancels_the_reservation(scene: CardScene) -> None:
    destination = scene.own(1, 2 * MIB)
    was_cancelled = asyncio.Event()

    async def hang() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            was_cancelled.set()

    async def scenario(cards: CardSupervisor) -> None:
        receiver = await warm(cards)
        scene.host.inject(Fault.IMPORT_REFUSED, card=1)
        with pytest.raises(CardRefused, match="refuses this import") as caught:
            await fetch(cards, destination, hang)
        assert not caught.value.touched
        assert was_cancelled.is_set()
        await assert_untouched(cards, receiver)

    scene.run(scenario)


def test_of_several_regions_none_stays_mapped_if_one_is_refused(scene: CardScene) -> None:
    regions = [scene.own(1, 2 * MIB) for _ in range(3)]
    elsewhere = own(regions[0].process, 2, 2 * MIB)

    async def scenario(cards: CardSupervisor) -> None:
        receiver = await warm(cards)
        asked = [owned.region for owned in (*regions[:2], elsewhere, regions[2])]
        with pytest.raises(CardRefused, match="can only be imported there"):
            await cards.fetch(card_name(1), fresh_key(), regions[0].blobs(), asked, timeout=60)
        await assert_untouched(cards, receiver)

    scene.run(scenario)


async def fetch(cards: CardSupervisor, destination: Owned, reserve: Reserve, timeout: float = 60) -> None:
    """Of a key that nobody offers."""
    regions = [destination.region]
    await cards.fetch(card_name(1), fresh_key(), destination.blobs(), regions, timeout=timeout, reserve=reserve)
