"""Two datasystem workers that form a cluster through etcd: each host's cards use their own worker."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from support.cards import CardScene, configuration, move, own, supervised
from support.datasystem_worker import DatasystemWorker, require_wheel
from support.etcd_server import EtcdServer

MIB = 1 << 20

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def workers() -> Iterator[list[DatasystemWorker]]:
    """Two of one cluster."""
    require_wheel()
    with ExitStack() as stack:
        etcd = EtcdServer()
        stack.callback(etcd.close)
        etcd.wait()
        found = []
        for _ in range(2):
            found.append(DatasystemWorker(etcd=etcd.address, is_confined=False))
            stack.callback(found[-1].close)
            found[-1].start()
        yield found


def test_cards_of_two_workers_fill_each_other_all_at_once(scene: CardScene, workers: list[DatasystemWorker]) -> None:
    process = scene.start_process()
    sources = [own(process, card, 4 * MIB, seed=10 * card) for card in range(4)]
    pairs = [(source, own(process, card, 4 * MIB)) for card in range(4) for source in sources if source.device != card]

    async def scenario() -> None:
        async with (
            supervised(configuration(scene.host, workers[0])) as here,
            supervised(configuration(scene.host, workers[1])) as there,
        ):
            hosts = [here, here, there, there]
            for source in sources:
                await hosts[source.device].register(source.card, source.region)
            await asyncio.gather(
                *(
                    move(hosts[source.device], source, destination, receiving=hosts[destination.device], timeout=200)
                    for source, destination in pairs
                )
            )
            for host in (here, there):
                assert all(not card.offers and not card.fetches and not card.problem for card in host.health)

    asyncio.run(scenario())
    for source, destination in pairs:
        assert destination.digest() == source.digest()
    assert scene.host.violations() == []
