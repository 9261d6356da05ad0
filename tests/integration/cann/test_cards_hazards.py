"""The engine's hazards (test_datasystem_hazards.py) do not reach those who use the cards.

H5 and H2 are in test_cards_deaths.py, H8 in test_cards_transfer.py. H6 (asking for device keys), H10 and H12 (KVClient)
concern calls that the card processes do not make.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from doubles.cann.control import CannHost, Fault
from support import acl
from support.card_process import CardProcess
from support.cards import configuration, move, own, supervised
from support.datasystem_worker import DatasystemWorker
from weight_brokerd.cards import messages
from weight_brokerd.cards.errors import CardRefused
from weight_brokerd.cards.hooks import Hooks
from weight_brokerd.cards.messages import Role
from weight_brokerd.cards.process import CardProcess as Child
from weight_brokerd.cards.senders import OfferEnd
from weight_brokerd.cards.supervisor import fresh_key

MIB = 1 << 20
StartProcess = Callable[..., CardProcess]

pytestmark = pytest.mark.timeout(60)


def test_h1_no_process_is_on_both_ends(
    cann_host: CannHost, worker: DatasystemWorker, start_process: StartProcess
) -> None:
    owned = own(start_process(), 0, MIB)

    async def scenario() -> None:
        configured = configuration(cann_host, worker)
        sender, receiver = await asyncio.gather(*(Child.start(role, 0, configured) for role in Role))
        with pytest.raises(CardRefused, match="a sender does not do Fetch"):
            await sender.ask(messages.Fetch("k", owned.blobs(), 1000))
        with pytest.raises(CardRefused, match="a receiver does not do Offer"):
            await receiver.ask(messages.Offer("k", owned.blobs()))
        await asyncio.gather(sender.stop(), receiver.stop())

    asyncio.run(scenario())


def test_h3_a_slow_reader_gets_the_right_bytes_although_a_fast_one_is_done_and_withdrawn(
    cann_host: CannHost, worker: DatasystemWorker, start_process: StartProcess
) -> None:
    source = own(start_process(), 0, 16 * MIB, seed=3)
    fast, slow = own(start_process(), 1, 16 * MIB), own(start_process(), 2, 16 * MIB)
    expected = source.digest()

    async def scenario() -> None:
        async with supervised(configuration(cann_host, worker)) as cards:
            await cards.register("npu:0", source.region)
            await asyncio.gather(cards.warm_up("npu:1"), cards.warm_up("npu:2"))
            cann_host.inject(Fault.SLOW_LINK, card=2, value=12 * MIB)
            slowly = asyncio.create_task(move(cards, source, slow))
            await asyncio.sleep(0.3)
            await move(cards, source, fast)
            assert not slowly.done(), "they did not overlap"
            assert cards.health[0].offers == 1, "the slow reader is counted"
            await slowly
            assert cards.health[0].offers == 0
            source.fill(None)  # as an instance does when its retraction is answered: now nobody reads

    asyncio.run(scenario())
    assert fast.digest() == slow.digest() == expected
    assert cann_host.violations() == []


def test_h3_memory_that_is_taken_back_under_a_reader_is_unmapped_and_the_reader_is_not_told_of_a_success(
    cann_host: CannHost, worker: DatasystemWorker, start_process: StartProcess
) -> None:
    source, destination = own(start_process(), 0, 16 * MIB, seed=3), own(start_process(), 1, 16 * MIB)
    other = own(source.process, 0, 2 * MIB, seed=4)
    lost: list[str] = []

    async def scenario() -> None:
        hooks = Hooks(on_offers_lost=lambda keys, _: lost.extend(keys))
        async with supervised(configuration(cann_host, worker), hooks) as cards:
            await cards.register("npu:0", source.region)
            await cards.register("npu:0", other.region)
            await cards.warm_up("npu:1")
            cann_host.inject(Fault.SLOW_LINK, value=4 * MIB)
            key = fresh_key()
            await cards.offer("npu:0", key, source.blobs())
            fetching = asyncio.create_task(
                cards.fetch("npu:1", key, destination.blobs(), [destination.region], timeout=30)
            )
            await asyncio.sleep(0.7)
            begun = time.monotonic()
            await cards.unregister("npu:0", source.region.region_id)
            assert time.monotonic() - begun < 4
            assert lost == [key]
            # The driver would refuse this if anybody had it open still.
            source.process.call(acl.close_key, bytes.fromhex(source.region.export_key))
            source.process.call(acl.free, source.address)
            assert not fetching.done()
            fetching.cancel()
            with pytest.raises(asyncio.CancelledError):
                await fetching
            cann_host.clear()
            assert (await cards.offer("npu:0", fresh_key(), other.blobs())).seconds, (
                "what else is published is still there"
            )

    asyncio.run(scenario())


def test_h4_and_h7_transfers_of_the_same_memory_follow_each_other_without_a_stall_and_with_its_content_of_the_time(
    cann_host: CannHost, worker: DatasystemWorker, start_process: StartProcess
) -> None:
    source = own(start_process(), 0, 2 * MIB, seed=0)
    destinations = [own(start_process(), card, 2 * MIB) for card in (1, 2)]

    async def scenario() -> None:
        async with supervised(configuration(cann_host, worker)) as cards:
            await cards.register("npu:0", source.region)
            for turn in range(5):
                source.fill(turn)
                for destination in destinations:
                    begun = time.monotonic()
                    await move(cards, source, destination)
                    assert time.monotonic() - begun < 10
                    assert destination.digest() == source.digest()
            assert cards.health[0].offers == 0

    asyncio.run(scenario())


def test_h9_blobs_that_the_engine_merges_go_to_cards_other_than_the_first(
    cann_host: CannHost, worker: DatasystemWorker, start_process: StartProcess
) -> None:
    source, destination = own(start_process(), 2, 4 * MIB, seed=3), own(start_process(), 3, 4 * MIB)
    spans = [(offset, 30_000) for offset in range(0, 4 * MIB - 30_000, 40_000)]

    async def scenario() -> None:
        async with supervised(configuration(cann_host, worker)) as cards:
            await cards.register("npu:2", source.region)
            await move(cards, source, destination, [(source.blobs(*spans), destination.blobs(*spans))])

    asyncio.run(scenario())
    for offset, size in spans[::20]:
        assert destination.read(offset, size) == source.read(offset, size)
    assert cann_host.violations() == []


def test_h11_every_thread_of_a_card_process_has_its_card(
    cann_host: CannHost, worker: DatasystemWorker, start_process: StartProcess
) -> None:
    source = own(start_process(), 1, 2 * MIB, seed=3)

    async def scenario() -> None:
        async with supervised(configuration(cann_host, worker)) as cards:
            await cards.register("npu:1", source.region)
            keys = [fresh_key() for _ in range(40)]
            packed = source.blobs((0, 100))._replace(blobs=(source.blobs((0, 100)).blobs[0]._replace(size=2 * MIB),))
            await asyncio.gather(*(cards.offer("npu:1", key, packed) for key in keys))
            (figures,) = (await cards.figures("npu:1")).values()
            assert (figures.keys, figures.staging_bytes) == (40, 80 * MIB)
            await asyncio.gather(*(cards.withdraw("npu:1", key, OfferEnd.UNREAD) for key in keys))
            (figures,) = (await cards.figures("npu:1")).values()
            assert (figures.keys, figures.staging_bytes) == (0, 0)
            assert cards.health[0].retiring_pids == ()

    asyncio.run(scenario())
    assert cann_host.violations() == []
