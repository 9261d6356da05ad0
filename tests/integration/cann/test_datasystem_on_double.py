"""The unmodified datasystem wheel and a real worker on the double: bytes move between processes and cards."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from doubles.cann.control import CannHost, Fault
from support import acl, card_actions
from support import datasystem_actions as engine
from support.acl import CHUNK
from support.card_process import CardProcess
from support.datasystem_worker import DatasystemWorker

StartClient = Callable[[DatasystemWorker], CardProcess]

pytestmark = pytest.mark.timeout(120)


def succeeded(outcome: engine.Outcome) -> bool:
    assert not outcome.error, outcome
    return not outcome.failed_keys


def mixed_sizes(number: int, total: int) -> list[int]:
    weights = [random.Random(index).uniform(0.2, 1.8) for index in range(number)]
    return [int(total * weight / sum(weights)) for weight in weights]


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(mixed_sizes(60, 120 << 20), id="60 blobs of about 2 MiB"),
        pytest.param([100 << 20], id="one blob"),
        pytest.param(mixed_sizes(100, 3 << 20), id="100 small blobs"),
    ],
)
def test_a_published_key_is_fetched_bit_for_bit(
    cann_host: CannHost, worker: DatasystemWorker, start_client: StartClient, key: str, sizes: list[int]
) -> None:
    publisher, reader = start_client(worker), start_client(worker)
    source = publisher.call(engine.allocate, 0, sizes, 7)
    destination = reader.call(engine.allocate, 1, sizes)
    assert succeeded(publisher.call(engine.publish, "client", key, 0, source))
    assert succeeded(reader.call(engine.fetch, "client", key, 1, destination))
    assert reader.call(engine.digest, destination) == publisher.call(engine.digest, source)
    assert succeeded(publisher.call(engine.withdraw, "client", key, 0))
    assert cann_host.violations() == []


def test_two_readers_at_once_each_with_a_key_of_its_own_on_memory_that_was_used_before(
    cann_host: CannHost, worker: DatasystemWorker, start_client: StartClient, key: str
) -> None:
    publisher, readers = start_client(worker), {1: start_client(worker), 2: start_client(worker)}
    sizes = [5 << 20] * 4
    source = publisher.call(engine.allocate, 0, sizes, 3)
    expected = publisher.call(engine.digest, source)
    cann_host.inject(Fault.SLOW_LINK, value=20e6)
    for turn in range(2):  # the second turn has warm connections
        fetching = []
        for card, reader in readers.items():
            destination = reader.call(engine.allocate, card, sizes)
            assert succeeded(publisher.call(engine.publish, "client", f"{key}-{turn}-{card}", 0, source))
            fetching.append(
                (reader, destination, reader.begin(engine.fetch, "client", f"{key}-{turn}-{card}", card, destination))
            )
        for reader, destination, answer in fetching:
            outcome = answer(60)
            assert succeeded(outcome)
            assert outcome.seconds > 0.9, "they did not overlap"
            assert reader.call(engine.digest, destination) == expected
        for card in readers:
            assert succeeded(publisher.call(engine.withdraw, "client", f"{key}-{turn}-{card}", 0))
    assert cann_host.violations() == []


def test_a_communicator_is_used_again_for_the_next_key(
    cann_host: CannHost, worker: DatasystemWorker, start_client: StartClient, key: str
) -> None:
    publisher, reader = start_client(worker), start_client(worker)
    source = publisher.call(engine.allocate, 0, [2 << 20] * 8, 5)
    destination = reader.call(engine.allocate, 1, [2 << 20] * 8)
    handles = []
    for turn in range(4):
        publisher.call(engine.fill, source, turn)
        assert succeeded(publisher.call(engine.publish, "client", f"{key}-{turn}", 0, source))
        assert succeeded(reader.call(engine.fetch, "client", f"{key}-{turn}", 1, destination))
        assert reader.call(engine.digest, destination) == publisher.call(engine.digest, source)
        assert succeeded(publisher.call(engine.withdraw, "client", f"{key}-{turn}", 0))
        handles.append((publisher.live, reader.live))
    assert handles[-1] == handles[0]
    assert handles[0][0]["communicators"] == handles[0][1]["communicators"] == 1


def test_weights_go_to_the_host_tier_and_to_another_card(
    cann_host: CannHost, worker: DatasystemWorker, start_client: StartClient, key: str
) -> None:
    one, other = start_client(worker), start_client(worker)
    sizes = mixed_sizes(40, 60 << 20)
    source, destination = one.call(engine.allocate, 0, sizes, 9), other.call(engine.allocate, 1, sizes)
    assert not one.call(engine.store, "client", key, 0, source).error
    one.kill()
    assert succeeded(other.call(engine.load, "client", key, 1, destination))
    again = other.call(engine.allocate, 1, sizes, 9)
    assert other.call(engine.digest, destination) == other.call(engine.digest, again)
    assert other.call(engine.load, "client", f"{key}-missing", 1, destination).error
    assert cann_host.violations() == []


@pytest.mark.parametrize("kind", ["plain", "chunks"])
def test_memory_of_other_processes_is_published_and_filled(
    cann_host: CannHost,
    start_process: Callable[..., CardProcess],
    worker: DatasystemWorker,
    start_client: StartClient,
    key: str,
    kind: str,
) -> None:
    owners, cards = (start_process(), start_process()), (start_client(worker), start_client(worker))
    size = 4 * CHUNK
    owned, imported = [], []
    for device, (owner, card) in enumerate(zip(owners, cards, strict=True)):
        owner.call(acl.set_device, device)
        card.call(acl.set_device, device)
        if kind == "plain":
            owned.append(owner.call(acl.malloc, size))
            imported.append(card.call(acl.import_key, owner.call(acl.export, owned[-1], size)))
        else:
            address, handles = owner.call(card_actions.map_chunks, 4, device)
            owned.append(address)
            shareables = [owner.call(acl.export_chunk, handle) for handle in handles]
            imported.append(card.call(card_actions.map_shared, shareables, device)[0])
    owners[0].call(engine.fill, [(owned[0], size)], 11)
    # Blobs that begin and end anywhere, also across chunks.
    layout = [(4096 + 17, CHUNK + 99), (2 * CHUNK - 512, CHUNK + 1024), (size - 700_000, 700_000)]
    assert succeeded(
        cards[0].call(engine.publish, "client", key, 0, [(imported[0] + offset, length) for offset, length in layout])
    )
    assert succeeded(
        cards[1].call(engine.fetch, "client", key, 1, [(imported[1] + offset, length) for offset, length in layout])
    )
    digests = [
        owner.call(engine.digest, [(address + offset, length) for offset, length in layout])
        for owner, address in zip(owners, owned, strict=True)
    ]
    assert digests[0] == digests[1]
    assert cann_host.violations() == []


def test_the_engine_does_not_notice_what_a_corrupting_link_does(
    cann_host: CannHost, worker: DatasystemWorker, start_client: StartClient, key: str
) -> None:
    publisher, reader = start_client(worker), start_client(worker)
    source, destination = publisher.call(engine.allocate, 0, [4 << 20], 7), reader.call(engine.allocate, 1, [4 << 20])
    assert succeeded(publisher.call(engine.publish, "client", key, 0, source))
    cann_host.inject(Fault.CORRUPT_LINK)
    assert succeeded(reader.call(engine.fetch, "client", key, 1, destination))
    assert reader.call(engine.digest, destination) != publisher.call(engine.digest, source)


def test_a_key_that_is_not_there_is_an_error_in_time(
    worker: DatasystemWorker, start_client: StartClient, key: str
) -> None:
    reader = start_client(worker)
    destination = reader.call(engine.allocate, 1, [4 << 20])
    answer = reader.begin(engine.fetch, "client", key, 1, destination, 500)
    assert answer(50).error, "within the engine's own time-out, which is a minute"
