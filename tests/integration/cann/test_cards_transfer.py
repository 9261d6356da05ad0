"""The card processes move weights: between cards with the real datasystem, within a card, bit for bit."""

from __future__ import annotations

import asyncio

import pytest

from doubles.cann.control import card_name
from support import acl, card_actions
from support.card_layouts import mixed_layout, placements, sides
from support.cards import CardScene, move, own, until
from weight_brokerd.cards.errors import CardRefused
from weight_brokerd.cards.offers import OfferEnd, fresh_key
from weight_brokerd.cards.plan import pieces as plan
from weight_brokerd.kinds.npu.supervisor import CardSupervisor

KIB, MIB = 1 << 10, 1 << 20

pytestmark = pytest.mark.timeout(90)


@pytest.mark.parametrize("chunks", [False, True], ids=["plain allocations", "chunks"])
def test_a_mixed_weight_set_fills_another_card_bit_for_bit_and_touches_nothing_else(
    scene: CardScene, chunks: bool
) -> None:
    layout = mixed_layout(60)
    (source_at, size), (destination_at, _) = placements(layout, 1), placements(layout, 2)
    source = scene.own(0, size, seed=3, chunks=chunks)
    destination = scene.own(1, size, seed=99, chunks=chunks)
    expected = bytearray(destination.read())
    sent = source.read()
    pieces = plan.pieces(layout, source_at, destination_at)
    for _, offset, _, to, length in pieces:
        expected[to : to + length] = sent[offset : offset + length]
    planned = sides(plan.rounds(pieces), source, destination)
    assert any(blob.is_packed for given, _ in planned for blob in given.blobs)

    async def scenario(cards: CardSupervisor) -> None:
        await move(cards, source, destination, planned)
        (sender,) = (await cards.figures(card_name(0))).values()
        assert (sender.imports, sender.keys, sender.staging_bytes) == (1, 0, 0)
        await asyncio.sleep(0.8)  # the receiver gives its replica back when its late acknowledgement is through
        (receiver,) = (await cards.figures(card_name(1))).values()
        assert (receiver.imports, receiver.keys, receiver.staging_bytes) == (0, 0, 0)
        await cards.unregister(source.card, source.region.region_id)
        (sender,) = (await cards.figures(card_name(0))).values()
        assert sender.imports == 0

    scene.run(scenario, source)
    assert destination.read() == bytes(expected)


def test_an_instance_on_the_same_card_is_filled_by_a_copy_on_the_card(scene: CardScene) -> None:
    source, destination = scene.own(0, 8 * MIB, seed=3), scene.own(0, 8 * MIB)

    async def scenario(cards: CardSupervisor) -> None:
        spans = [(512, 3 * MIB), (5 * MIB, 1000)]
        regions = [source.region, destination.region]
        await cards.copy(card_name(0), source.blobs(*spans), destination.blobs(*spans), regions, timeout=10)
        for offset, length in spans:
            assert destination.read(offset, length) == source.read(offset, length)
        assert not any(destination.read(4 * MIB, MIB))
        with pytest.raises(CardRefused, match="other sizes"):
            await cards.copy(card_name(0), source.blobs((0, 8)), destination.blobs((0, 9)), regions, timeout=10)

    scene.run(scenario, source)


def test_four_cards_fill_each_other_all_at_once(scene: CardScene) -> None:
    """Also: several readers of one source at a time, fetches into one card at a time, first uses at a time (H8)."""
    process = scene.start_process()
    sources = [own(process, card, 4 * MIB, seed=10 * card) for card in range(4)]
    destinations = [
        (own(process, card, 4 * MIB), source)
        for card in range(4)
        for source in sources
        if source.card != card_name(card)
    ]

    async def scenario(cards: CardSupervisor) -> None:
        await asyncio.gather(*(cards.register(source.card, source.region) for source in sources))
        await asyncio.gather(*(move(cards, source, destination) for destination, source in destinations))
        assert all(not card.offers and not card.fetches and not card.problem for card in cards.health)

    scene.run(scenario, receivers_per_card=2)
    for destination, source in destinations:
        assert destination.digest() == source.digest()


def test_what_does_not_fit_the_regions_is_refused_before_anything_is_touched(scene: CardScene) -> None:
    source, destination = scene.pair(4 * MIB)

    async def scenario(cards: CardSupervisor) -> None:
        with pytest.raises(CardRefused, match="no such regions"):
            await cards.offer(card_name(0), fresh_key(), source.blobs())
        await cards.register(card_name(0), source.region)
        with pytest.raises(CardRefused, match="not within it"):
            await cards.offer(card_name(0), fresh_key(), source.blobs((4 * MIB - 10, 11)))
        taken = destination.blobs((0, 4 * MIB + 1))
        with pytest.raises(CardRefused, match="not within it") as caught:
            await cards.fetch(card_name(1), fresh_key(), taken, [destination.region], timeout=30)
        assert not caught.value.touched
        with pytest.raises(CardRefused, match="not mapped here"):
            await cards.fetch(card_name(1), fresh_key(), destination.blobs(), [], timeout=30)
        pid = cards.health[1].receiver_pids
        await move(cards, source, destination)
        assert cards.health[1].receiver_pids == pid, "a refusal costs no process"

    scene.run(scenario)
    assert destination.digest() == source.digest()


def test_memory_that_its_exporter_keeps_from_the_cards_processes_is_refused(scene: CardScene) -> None:
    source = scene.own(0, 2 * MIB, seed=3, any_process=False)

    async def scenario(cards: CardSupervisor) -> None:
        with pytest.raises(CardRefused, match="not on the exporter's whitelist"):
            await cards.register(card_name(0), source.region)

    scene.run(scenario)


def test_processes_that_are_not_needed_end(scene: CardScene) -> None:
    source, destination = scene.pair(2 * MIB)

    async def scenario(cards: CardSupervisor) -> None:
        await move(cards, source, destination)
        await until(lambda: cards.health[1].receiver_pids == ())
        assert cards.health[0].sender_pid, "there is memory to send"
        await cards.unregister(card_name(0), source.region.region_id)
        await until(lambda: (cards.health[0].sender_pid, cards.health[0].retiring_pids) == (0, ()))
        await until(lambda: scene.host.used_bytes() == {0: 2 * MIB, 1: 2 * MIB})
        await cards.register(card_name(0), source.region)
        await move(cards, source, destination)

    scene.run(scenario, source, receiver_idle_seconds=0.2, sender_idle_seconds=0.2)


def test_a_source_is_read_by_one_key_while_another_is_withdrawn_unread(scene: CardScene) -> None:
    source, destination = scene.pair(2 * MIB)

    async def scenario(cards: CardSupervisor) -> None:
        pid = cards.health[0].sender_pid
        unread = fresh_key()
        await cards.offer(card_name(0), unread, source.blobs())
        await move(cards, source, destination)
        await cards.withdraw(card_name(0), unread, OfferEnd.UNREAD)
        await cards.withdraw(card_name(0), unread, OfferEnd.UNREAD)
        assert cards.health[0].sender_pid == pid
        assert cards.health[0].offers == 0

    scene.run(scenario, source)
    assert destination.digest() == source.digest()


def test_cards_transfer_beside_the_engines_own_communicators(scene: CardScene) -> None:
    """The processes of a tensor-parallel engine hold the default ports of both cards. Card 1 receives, then sends."""
    source, middle = scene.pair(4 * MIB)
    last = scene.own(2, 4 * MIB)
    root = source.process.call(acl.root_info)
    waiting = source.process.begin(card_actions.meet, root, 0)
    middle.process.call(acl.set_device, 1)
    middle.process.call(card_actions.meet, root, 1)
    waiting(10)

    async def scenario(cards: CardSupervisor) -> None:
        await move(cards, source, middle)
        await cards.register(middle.card, middle.region)
        await move(cards, middle, last)

    scene.run(scenario, source)
    assert last.digest() == source.digest()
