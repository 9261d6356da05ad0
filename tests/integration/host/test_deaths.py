"""kill -9 is a way to stop anything: what dies leaves nothing behind, and nobody is left waiting."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support import actions
from support.broker_process import BrokerProcess
from support.instance_process import InstanceProcess
from support.waiting import eventually
from weight_broker import WeightsNotFound
from weight_broker.v1 import inspection_service_pb2 as inspection

Start = Callable[..., InstanceProcess]


def counts(broker: BrokerProcess) -> tuple[int, ...]:
    host = broker.host()
    return (
        host.instance_count,
        host.publication_count,
        host.region_count,
        host.running_transfer_count,
        host.waiting_acquisition_count,
        host.cold_load_lease_count,
    )


def is_copying(reader: InstanceProcess) -> bool:
    """Whether the reader has the source's memory: from then on it needs the broker for nothing but its report."""
    return "/memfd:weight-broker" in Path(f"/proc/{reader.pid}/maps").read_text()


def test_a_killed_publisher_leaves_every_listing(broker: BrokerProcess, start_instance: Start) -> None:
    publisher, other = start_instance("publisher"), start_instance("other")
    publisher.call(actions.publish, "model", 1)
    other.call(actions.publish, "other", 2)
    publisher.kill()
    eventually(lambda: [one.instance_name for one in broker.publications()] == ["other"])
    assert [instance.name for instance in broker.instances()] == ["other"]
    listed = broker.inspection.ListWeightSets(inspection.ListWeightSetsRequest()).weight_sets
    assert [weight_set.key.model for weight_set in listed] == ["other"]
    other.call(actions.prepare)
    with pytest.raises(WeightsNotFound):
        other.call(actions.acquire, "model")


def test_a_publisher_killed_while_it_is_read_does_not_break_the_reader(
    broker: BrokerProcess, start_instance: Start
) -> None:
    publisher, reader = start_instance("publisher"), start_instance("reader")
    publisher.call(actions.publish, "model", 1, count=16)
    reader.call(actions.prepare, count=16)
    reader.call(actions.slow_copies, 0.05)
    reader.begin(actions.acquire, "model")
    eventually(lambda: is_copying(reader))
    reader.process.send_signal(signal.SIGSTOP)  # in the middle
    publisher.kill()
    eventually(lambda: not broker.publications())
    assert broker.host().running_transfer_count == 1, "the reader was still reading"
    reader.process.send_signal(signal.SIGCONT)
    reader.result()
    assert reader.call(actions.current) == actions.expected(1, count=16)
    eventually(lambda: broker.memfds() == 0)


def test_a_killed_reader_gives_its_slot_back(start_broker: Callable[..., BrokerProcess], start_instance: Start) -> None:
    broker = start_broker(WEIGHT_BROKER_LIMITS_READERS_PER_PUBLICATION="1")
    publisher, first, second = (start_instance(name) for name in ("publisher", "first", "second"))
    publisher.call(actions.publish, "model", 1, count=16)
    for reader in (first, second):
        reader.call(actions.prepare, count=16)
    first.call(actions.slow_copies, 0.5)
    first.begin(actions.acquire, "model")
    eventually(lambda: broker.host().running_transfer_count == 1)
    first.process.send_signal(signal.SIGSTOP)  # in the middle
    second.begin(actions.acquire, "model")
    eventually(lambda: broker.host().waiting_acquisition_count == 1)
    first.kill()
    second.result(60)
    assert second.call(actions.current) == actions.expected(1, count=16)


def test_a_retraction_waits_for_its_readers(broker: BrokerProcess, start_instance: Start) -> None:
    publisher, reader, late = (start_instance(name) for name in ("publisher", "reader", "late"))
    publisher.call(actions.publish, "model", 1, count=16)
    for instance in (reader, late):
        instance.call(actions.prepare, count=16)
    reader.call(actions.slow_copies, 0.05)
    reader.begin(actions.acquire, "model")
    eventually(lambda: broker.host().running_transfer_count == 1)
    reader.process.send_signal(signal.SIGSTOP)  # in the middle
    publisher.begin(actions.retract_all, timeout=60.0)
    eventually(lambda: "STATE_RETRACTING" in str(broker.publications()))
    with pytest.raises(WeightsNotFound):
        late.call(actions.acquire, "model")
    assert broker.host().running_transfer_count == 1
    reader.process.send_signal(signal.SIGCONT)
    publisher.result()
    assert broker.host().running_transfer_count == 0, "the retraction returned before its reader had ended"
    reader.result()
    assert reader.call(actions.current) == actions.expected(1, count=16)


def test_nothing_leaks_over_many_deaths(broker: BrokerProcess, start_instance: Start) -> None:
    survivor = start_instance("survivor")
    survivor.call(actions.prepare)
    survivor.call(actions.publish, "warm-up", 9)
    survivor.call(actions.acquire, "warm-up")
    survivor.call(actions.retract_all)
    idle = counts(broker)  # the test's own connection is open from here on
    before = (survivor.call(actions.resources), len(broker.descriptors()), broker.memfds())
    for round_number in range(4):
        publisher, reader, waiter = (start_instance(f"{name}-{round_number}") for name in ("p", "r", "w"))
        publisher.call(actions.publish, "model", 1)
        survivor.call(actions.acquire, "model")
        reader.call(actions.prepare)
        reader.call(actions.slow_copies, 5.0)
        reader.begin(actions.acquire, "model")
        waiter.call(actions.prepare)
        waiter.call(actions.take_lease, "absent")
        eventually(lambda: broker.host().running_transfer_count == 1)
        for instance in (publisher, reader, waiter):
            instance.kill()
        eventually(lambda: counts(broker) == idle)
    eventually(lambda: len(broker.descriptors()) <= before[1])
    assert broker.memfds() == before[2] == 0
    assert survivor.call(actions.resources) == before[0]


def test_a_killed_broker_comes_back_with_what_the_instances_hold(
    start_broker: Callable[..., BrokerProcess], start_instance: Start
) -> None:
    broker = start_broker()
    publisher, reader = start_instance("publisher"), start_instance("reader")
    publisher.call(actions.publish, "one", 1)
    publisher.call(actions.publish_current, "two")
    generations = {one.generation for one in broker.publications()}
    broker.kill()
    publisher.call(actions.sleep, 0.1)  # it goes on serving
    broker.start()
    eventually(lambda: len(broker.publications()) == 2)
    assert not generations & {one.generation for one in broker.publications()}, "a generation was repeated"
    reader.call(actions.prepare)
    reader.call(actions.acquire, "one")
    assert reader.call(actions.current) == actions.expected(1)
    listed = sorted(one.publication_id for one in broker.publications())
    assert sorted(publisher.call(actions.publication_ids)) == listed, "the client knows its publications' new ids"
    publisher.call(actions.retract_all)
    assert broker.publications() == []


def test_a_broker_killed_while_a_reader_copies_costs_the_reader_nothing(
    broker: BrokerProcess, start_instance: Start
) -> None:
    publisher, reader = start_instance("publisher"), start_instance("reader")
    publisher.call(actions.publish, "model", 1, count=16)
    reader.call(actions.prepare, count=16)
    reader.call(actions.slow_copies, 0.05)
    reader.begin(actions.acquire, "model")
    eventually(lambda: is_copying(reader))
    reader.process.send_signal(signal.SIGSTOP)  # in the middle
    broker.kill()
    reader.process.send_signal(signal.SIGCONT)
    reader.result()
    assert reader.call(actions.current) == actions.expected(1, count=16)


def test_a_broker_killed_while_instances_wait_sends_them_to_the_disk(
    broker: BrokerProcess, start_instance: Start
) -> None:
    loader, waiter = start_instance("loader"), start_instance("waiter")
    for instance in (loader, waiter):
        instance.call(actions.prepare)
    assert loader.call(actions.take_lease, "model")
    waiter.begin(actions.acquire_or_load, "model", 1)
    eventually(lambda: broker.host().waiting_acquisition_count == 1)
    broker.kill()
    source, checksum, _ = waiter.result(60)
    assert (source, checksum) == ("disk", actions.expected(1))


def test_a_second_broker_on_the_same_sockets_refuses_and_harms_nothing(
    broker: BrokerProcess, start_instance: Start
) -> None:
    publisher, reader = start_instance("publisher"), start_instance("reader")
    publisher.call(actions.publish, "model", 1)
    second = subprocess.run(
        [sys.executable, "-m", "weight_brokerd"],
        env={**os.environ, "WEIGHT_BROKER_RUNTIME_DIRECTORY": str(broker.runtime_directory)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert second.returncode == 3
    assert str(broker.pid) in second.stderr, "it names who has the sockets"
    reader.call(actions.prepare)
    reader.call(actions.acquire, "model")
    assert reader.call(actions.current) == actions.expected(1)


def test_a_frozen_broker_costs_a_bounded_time(broker: BrokerProcess, start_instance: Start) -> None:
    instance = start_instance("instance")
    instance.call(actions.prepare)
    os.kill(broker.pid, signal.SIGSTOP)
    try:
        source, checksum, _ = instance.call(actions.acquire_or_load, "model", 1, timeout=5.0)
    finally:
        os.kill(broker.pid, signal.SIGCONT)
    assert (source, checksum) == ("disk", actions.expected(1))


def _wait_for_a_lease(broker: BrokerProcess, loader: InstanceProcess, waiting: InstanceProcess) -> None:
    for instance in (loader, waiting):
        instance.call(actions.prepare)
    loader.call(actions.take_lease, "model")
    waiting.begin(actions.acquire_or_load, "model", 1, timeout=600.0)
    eventually(lambda: broker.host().waiting_acquisition_count == 1)


@pytest.mark.slow
def test_a_broker_that_freezes_in_a_call_costs_less_than_the_whole_timeout(
    broker: BrokerProcess, start_instance: Start
) -> None:
    loader, waiting = start_instance("loader"), start_instance("waiting")
    _wait_for_a_lease(broker, loader, waiting)
    os.kill(broker.pid, signal.SIGSTOP)
    try:
        source, checksum, _ = waiting.result(120.0)
    finally:
        os.kill(broker.pid, signal.SIGCONT)
    assert (source, checksum) == ("disk", actions.expected(1))


@pytest.mark.slow
def test_a_call_may_wait_for_longer_than_pings_take(broker: BrokerProcess, start_instance: Start) -> None:
    loader, waiting = start_instance("loader"), start_instance("waiting")
    _wait_for_a_lease(broker, loader, waiting)
    time.sleep(75)
    loader.call(actions.publish, "model", 1)
    source, checksum, _ = waiting.result(60.0)
    assert (source, checksum) == ("peer", actions.expected(1))


def test_the_runtime_directory_of_a_killed_broker_can_be_used_again(
    start_broker: Callable[..., BrokerProcess], tmp_path: Path
) -> None:
    broker = start_broker()
    assert (tmp_path / "run" / "attach.sock").exists()
    broker.kill()
    broker.start()
    assert broker.host().pid == broker.pid
    assert broker.terminate() == 0


def test_closing_a_client_ends_everything_it_held(broker: BrokerProcess, start_instance: Start) -> None:
    instance = start_instance("instance")
    before = counts(broker)
    instance.call(actions.publish, "model", 1)
    instance.call(actions.take_lease, "absent")
    assert counts(broker) != before
    instance.call(actions.close)
    eventually(lambda: counts(broker) == before)
