"""The card processes move weights: between cards with the real datasystem, within a card, bit for bit."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from doubles.cann.control import CannHost
from support import acl
from support.card_process import CardProcess
from support.cards import Owned, configuration, move, own, supervised, until
from support.datasystem_worker import DatasystemWorker
from weight_broker.layout import Layout, TensorSpec
from weight_brokerd.cards import plan
from weight_brokerd.cards.blobs import BlobList
from weight_brokerd.cards.errors import CardRefused
from weight_brokerd.cards.hooks import Hooks
from weight_brokerd.cards.senders import OfferEnd
from weight_brokerd.cards.supervisor import fresh_key

KIB, MIB = 1 << 10, 1 << 20
StartProcess = Callable[..., CardProcess]

pytestmark = pytest.mark.timeout(90)


def sides(rounds: list[plan.Round], source: Owned, destination: Owned) -> list[tuple[BlobList, BlobList]]:
    ids = (source.region.region_id,), (destination.region.region_id,)
    return [(BlobList(ids[0], given), BlobList(ids[1], taken)) for given, taken in rounds]


def mixed_layout() -> Layout:
    """Large, small and tiny tensors, one with gaps, one that is tied."""
    generator = random.Random(8)
    sizes = [
        generator.choice([64, 4 * KIB, 100 * KIB, 700 * KIB, 3 * MIB]) + generator.randrange(64) for _ in range(60)
    ]
    specs = [TensorSpec(f"t{index:03}", "uint8", (size,), (1,), size) for index, size in enumerate(sizes)]
    specs.append(TensorSpec("u-gapped", "bfloat16", (33, 100), (128, 1), (32 * 128 + 100) * 2))
    specs.append(TensorSpec("v-tied", "uint8", (sizes[0],), (1,), sizes[0], alias_of="t000"))
    return Layout(specs)


def placements(layout: Layout, seed: int) -> tuple[list[plan.Placement], int]:
    """One after the other in an order of `seed`, and how much they take."""
    order = [index for index, spec in enumerate(layout) if not spec.alias_of]
    random.Random(seed).shuffle(order)
    found, at = [(0, 0)] * len(layout), 0
    for index in order:
        found[index] = (0, at)
        at += -(-layout[index].storage_bytes // 512) * 512
    return found, -(-at // acl.CHUNK) * acl.CHUNK


@pytest.mark.parametrize("chunks", [False, True], ids=["plain allocations", "chunks"])
def test_a_mixed_weight_set_fills_another_card_bit_for_bit_and_touches_nothing_else(
    cann_host: CannHost, worker: DatasystemWorker, start_process: StartProcess, chunks: bool
) -> None:
    layout = mixed_layout()
    (source_at, size), (destination_at, _) = placements(layout, 1), placements(layout, 2)
    source = own(start_process(), 0, size, seed=3, chunks=chunks)
    destination = own(start_process(), 1, size, seed=99, chunks=chunks)
    expected = bytearray(destination.read())
    sent = source.read()
    pieces = plan.pieces(layout, source_at, destination_at)
    for _, offset, _, to, length in pieces:
        expected[to : to + length] = sent[offset : offset + length]
    planned = sides(plan.rounds(pieces), source, destination)
    assert any(blob.is_packed for given, _ in planned for blob in given.blobs)

    async def scenario() -> None:
        async with supervised(configuration(cann_host, worker)) as cards:
            await cards.register(source.card, source.region)
            await move(cards, source, destination, planned)
            (sender,) = (await cards.figures("npu:0")).values()
            assert (sender.imports, sender.keys, sender.staging_bytes) == (1, 0, 0)
            await asyncio.sleep(0.8)  # the receiver gives its replica back when its late acknowledgement is through
            (receiver,) = (await cards.figures("npu:1")).values()
            assert (receiver.imports, receiver.keys, receiver.staging_bytes) == (0, 0, 0)
            await cards.unregister(source.card, source.region.region_id)
            (sender,) = (await cards.figures("npu:0")).values()
            assert sender.imports == 0

    asyncio.run(scenario())
    assert destination.read() == bytes(expected)
    assert cann_host.violations() == []


def test_an_instance_on_the_same_card_is_filled_by_a_copy_on_the_card(
    cann_host: CannHost, worker: DatasystemWorker, start_process: StartProcess
) -> None:
    source, destination = own(start_process(), 0, 8 * MIB, seed=3), own(start_process(), 0, 8 * MIB)

    async def scenario() -> None:
        async with supervised(configuration(cann_host, worker)) as cards:
            await cards.register(source.card, source.region)  # it is a source for others at the same time
            spans = [(512, 3 * MIB), (5 * MIB, 1000)]
            regions = [source.region, destination.region]
            await cards.copy("npu:0", source.blobs(*spans), destination.blobs(*spans), regions, timeout=10)
            for offset, length in spans:
                assert destination.read(offset, length) == source.read(offset, length)
            assert not any(destination.read(4 * MIB, MIB))
            with pytest.raises(CardRefused, match="other sizes"):
                await cards.copy("npu:0", source.blobs((0, 8)), destination.blobs((0, 9)), regions, timeout=10)

    asyncio.run(scenario())
    assert cann_host.violations() == []


def test_four_cards_fill_each_other_all_at_once(
    cann_host: CannHost, worker: DatasystemWorker, start_process: StartProcess
) -> None:
    """Also: several readers of one source at a time, fetches into one card at a time, first uses at a time (H8)."""
    process = start_process()
    sources = [own(process, card, 4 * MIB, seed=10 * card) for card in range(4)]
    destinations = [
        (own(process, card, 4 * MIB), source) for card in range(4) for source in sources if source.card != f"npu:{card}"
    ]

    async def scenario() -> None:
        async with supervised(configuration(cann_host, worker, receivers_per_card=2)) as cards:
            await asyncio.gather(*(cards.register(source.card, source.region) for source in sources))
            await asyncio.gather(*(move(cards, source, destination) for destination, source in destinations))
            assert all(not card.offers and not card.fetches and not card.problem for card in cards.health)

    asyncio.run(scenario())
    for destination, source in destinations:
        assert destination.digest() == source.digest()
    assert cann_host.violations() == []


def test_what_does_not_fit_the_regions_is_refused_before_anything_is_touched(
    cann_host: CannHost, worker: DatasystemWorker, start_process: StartProcess
) -> None:
    source, destination = own(start_process(), 0, 4 * MIB, seed=3), own(start_process(), 1, 4 * MIB)

    async def scenario() -> None:
        async with supervised(configuration(cann_host, worker)) as cards:
            with pytest.raises(CardRefused, match="no such regions"):
                await cards.offer("npu:0", fresh_key(), source.blobs())
            await cards.register("npu:0", source.region)
            with pytest.raises(CardRefused, match="not within it"):
                await cards.offer("npu:0", fresh_key(), source.blobs((4 * MIB - 10, 11)))
            taken = destination.blobs((0, 4 * MIB + 1))
            with pytest.raises(CardRefused, match="not within it") as caught:
                await cards.fetch("npu:1", fresh_key(), taken, [destination.region], timeout=5)
            assert not caught.value.touched
            with pytest.raises(CardRefused, match="not mapped here"):
                await cards.fetch("npu:1", fresh_key(), destination.blobs(), [], timeout=5)
            pid = cards.health[1].receiver_pids
            await move(cards, source, destination)
            assert cards.health[1].receiver_pids == pid, "a refusal costs no process"

    asyncio.run(scenario())
    assert destination.digest() == source.digest()


def test_the_exporter_lets_exactly_the_processes_in_that_are_about_to_import(
    cann_host: CannHost, worker: DatasystemWorker, start_process: StartProcess
) -> None:
    source = own(start_process(), 0, 2 * MIB, seed=3, any_process=False)
    destination = own(start_process(), 1, 2 * MIB, any_process=False)
    owners = {owned.region.region_id: owned for owned in (source, destination)}

    async def authorize(region_id: str, bare_tgid: int) -> None:
        owned = owners[region_id]
        key = bytes.fromhex(owned.region.export_key)
        await asyncio.to_thread(owned.process.call, acl.allow, key, bare_tgid)

    async def scenario() -> None:
        async with supervised(configuration(cann_host, worker)) as cards:
            with pytest.raises(CardRefused, match="not on the exporter's whitelist"):
                await cards.register("npu:0", source.region)
        async with supervised(configuration(cann_host, worker), Hooks(authorize=authorize)) as cards:
            await cards.register("npu:0", source.region)
            await move(cards, source, destination)

    asyncio.run(scenario())
    assert destination.digest() == source.digest()


def test_processes_that_are_not_needed_end(
    cann_host: CannHost, worker: DatasystemWorker, start_process: StartProcess
) -> None:
    source, destination = own(start_process(), 0, 2 * MIB, seed=3), own(start_process(), 1, 2 * MIB)

    async def scenario() -> None:
        short = configuration(cann_host, worker, receiver_idle_seconds=0.2, sender_idle_seconds=0.2)
        async with supervised(short) as cards:
            await cards.register("npu:0", source.region)
            await move(cards, source, destination)
            await until(lambda: cards.health[1].receiver_pids == ())
            assert cards.health[0].sender_pid, "there is memory to send"
            await cards.unregister("npu:0", source.region.region_id)
            await until(lambda: (cards.health[0].sender_pid, cards.health[0].retiring_pids) == (0, ()))
            await until(lambda: cann_host.used_bytes() == {0: 2 * MIB, 1: 2 * MIB})
            await cards.register("npu:0", source.region)
            await move(cards, source, destination)

    asyncio.run(scenario())


def test_a_source_is_read_by_one_key_while_another_is_withdrawn_unread(
    cann_host: CannHost, worker: DatasystemWorker, start_process: StartProcess
) -> None:
    source, destination = own(start_process(), 0, 2 * MIB, seed=3), own(start_process(), 1, 2 * MIB)

    async def scenario() -> None:
        async with supervised(configuration(cann_host, worker)) as cards:
            await cards.register("npu:0", source.region)
            pid = cards.health[0].sender_pid
            unread = fresh_key()
            await cards.offer("npu:0", unread, source.blobs())
            await move(cards, source, destination)
            await cards.withdraw("npu:0", unread, OfferEnd.UNREAD)
            await cards.withdraw("npu:0", unread, OfferEnd.UNREAD)
            assert cards.health[0].sender_pid == pid
            assert cards.health[0].offers == 0

    asyncio.run(scenario())
    assert destination.digest() == source.digest()
