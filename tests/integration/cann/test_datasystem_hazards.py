"""What the engine does when used as its documentation invites to: the hazards that the broker is built around.

These tests show the engine's behaviour, not the broker's. One that fails after an upgrade of the wheel is good news,
and a reason to look at the design again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from doubles.cann.control import CannHost, Fault
from support import acl
from support import datasystem_actions as engine
from support.card_process import CardProcess
from support.datasystem_worker import DatasystemWorker, require_wheel
from support.waiting import eventually

SIZE = 24 << 20

StartProcess = Callable[..., CardProcess]
StartClient = Callable[[DatasystemWorker], CardProcess]


@pytest.fixture
def own_worker() -> Iterator[DatasystemWorker]:
    """A worker for one test, which may leave it broken."""
    require_wheel()
    worker = DatasystemWorker()
    try:
        yield worker.start()
    finally:
        worker.close()


def published(start_process: StartProcess, sender: CardProcess, key: str) -> tuple[CardProcess, int]:
    """A process that owns memory on card 0, which `sender` imports and publishes; and its address there."""
    owner = start_process()
    owner.call(acl.set_device, 0)
    sender.call(acl.set_device, 0)
    address = owner.call(acl.malloc, SIZE)
    owner.call(engine.fill, [(address, SIZE)], 3)
    imported = sender.call(acl.import_key, owner.call(acl.export, address, SIZE))
    assert sender.call(engine.publish, "client", key, 0, [(imported, SIZE)]).failed_keys == []
    return owner, address


def test_h3_of_two_readers_of_one_key_the_slower_gets_wrong_bytes_and_no_error(
    cann_host: CannHost, start_process: StartProcess, worker: DatasystemWorker, start_client: StartClient, key: str
) -> None:
    sender, fast, slow = start_client(worker), start_client(worker), start_client(worker)
    owner, address = published(start_process, sender, key)
    expected = owner.call(engine.digest, [(address, SIZE)])
    destinations = {1: fast.call(engine.allocate, 1, [SIZE]), 2: slow.call(engine.allocate, 2, [SIZE])}
    cann_host.inject(Fault.SLOW_LINK, pid=slow.pid, value=5e6)
    cann_host.inject(Fault.SLOW_LINK, pid=fast.pid, value=30e6)
    slowly = slow.begin(engine.fetch, "client", key, 2, destinations[2])
    eventually(lambda: "pending_tasks" in cann_host.live(slow.pid))
    assert fast.call(engine.fetch, "client", key, 1, destinations[1]).failed_keys == []
    assert fast.call(engine.digest, destinations[1]) == expected
    assert sender.call(engine.withdraw, "client", key, 0).failed_keys == [], "the source says that nobody reads it"
    owner.call(engine.fill, [(address, SIZE)], None)
    assert slowly(30).failed_keys == []
    assert slow.call(engine.digest, destinations[2]) != expected


def test_h7_publishing_a_key_again_for_the_same_memory_does_nothing(
    worker: DatasystemWorker, start_client: StartClient, key: str
) -> None:
    publisher, other = start_client(worker), start_client(worker)
    source = publisher.call(engine.allocate, 0, [SIZE], 1)
    elsewhere = publisher.call(engine.allocate, 0, [SIZE], 2)
    assert publisher.call(engine.publish, "client", key, 0, source).failed_keys == []
    assert publisher.call(engine.publish, "client", key, 0, source).failed_keys == []
    assert publisher.call(engine.publish, "client", key, 0, elsewhere).failed_keys == [key]
    theirs = other.call(engine.allocate, 1, [SIZE], 2)
    assert other.call(engine.publish, "client", key, 1, theirs).failed_keys == [key]


def test_h11_every_calling_thread_needs_its_own_device(
    worker: DatasystemWorker, start_client: StartClient, key: str
) -> None:
    publisher = start_client(worker)
    source = publisher.call(engine.allocate, 0, [SIZE], 1)
    assert publisher.call(engine.publish_in_a_fresh_thread, "client", key, 0, source).error
    assert publisher.call(engine.publish, "client", key, 0, source).failed_keys == []


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_h1_one_client_on_both_ends_waits_for_itself(
    own_worker: DatasystemWorker, start_client: StartClient, key: str
) -> None:
    process = start_client(own_worker)
    # With a blob above 1 MiB the engine dereferences a null pointer in a thread of its own after the minute.
    source = process.call(engine.allocate, 0, [1 << 20], 1)
    assert process.call(engine.publish, "client", key, 0, source).failed_keys == []
    destination = process.call(engine.allocate, 1, [1 << 20])
    outcome = process.begin(engine.fetch, "client", key, 1, destination, 3000)(120)
    assert outcome.error
    assert outcome.seconds > 55, "although it was told to wait 3 s"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_h9_more_than_100_mib_of_small_blobs_in_one_key_never_arrive(
    own_worker: DatasystemWorker, start_client: StartClient, key: str
) -> None:
    publisher, reader = start_client(own_worker), start_client(own_worker)
    sizes = [1 << 18] * 500  # 125 MiB, which the engine merges in a pool of 100 MiB
    source = publisher.call(engine.allocate, 0, sizes, 1)
    destination = reader.call(engine.allocate, 1, sizes)
    assert publisher.call(engine.publish, "client", key, 0, source).failed_keys == []
    outcome = reader.begin(engine.fetch, "client", key, 1, destination, 3000)(120)
    assert outcome.error
    assert outcome.seconds > 55, "although it was told to wait 3 s"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_h2_a_publisher_killed_in_mid_transfer_costs_a_minute_and_poisons_the_key(
    cann_host: CannHost, own_worker: DatasystemWorker, start_client: StartClient, key: str
) -> None:
    publisher, reader, next_publisher = start_client(own_worker), start_client(own_worker), start_client(own_worker)
    source = publisher.call(engine.allocate, 0, [SIZE], 1)
    destination = reader.call(engine.allocate, 1, [SIZE])
    assert publisher.call(engine.publish, "client", key, 0, source).failed_keys == []
    cann_host.inject(Fault.SLOW_LINK, value=6e6)
    fetching = reader.begin(engine.fetch, "client", key, 1, destination, 3000)
    eventually(lambda: "pending_tasks" in cann_host.live(reader.pid))
    publisher.kill()
    outcome = fetching(120)
    assert outcome.error
    assert outcome.seconds > 55, "although it was told to wait 3 s"
    source = next_publisher.call(engine.allocate, 2, [SIZE], 1)
    assert next_publisher.call(engine.publish, "client", key, 2, source).failed_keys == [key]
    assert next_publisher.call(engine.publish, "client", f"{key}-2", 2, source).failed_keys == []


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_h5_a_fetch_that_has_timed_out_goes_on_writing(
    cann_host: CannHost, own_worker: DatasystemWorker, start_client: StartClient, key: str
) -> None:
    publisher, reader = start_client(own_worker), start_client(own_worker)
    source = publisher.call(engine.allocate, 0, [SIZE], 1)
    destination = reader.call(engine.allocate, 1, [SIZE])
    assert publisher.call(engine.publish, "client", key, 0, source).failed_keys == []
    cann_host.inject(Fault.SLOW_LINK, value=SIZE / 80)
    outcome = reader.call(engine.fetch, "client", key, 1, destination, 3000)
    assert outcome.error
    tasks = cann_host.live(reader.pid)["pending_tasks"]
    assert tasks, "nothing is under way any more"
    with pytest.raises(acl.AclError, match="in use by 1 tasks"):
        reader.call(acl.free, destination[0][0])
    received = cann_host.counters(reader.pid)["bytes_received"]
    cann_host.clear()
    eventually(lambda: cann_host.counters(reader.pid)["bytes_received"] >= received + SIZE)
