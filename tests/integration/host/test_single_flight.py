"""One process of all loads from disk; the others wait for it and are filled."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from support import actions
from support.broker_process import BrokerProcess
from support.instance_process import InstanceProcess, RemoteError
from support.waiting import eventually
from weight_broker.v1 import inspection_service_pb2 as inspection

Start = Callable[..., InstanceProcess]
INSTANCES = 16


def test_of_sixteen_that_ask_at_once_one_loads_and_all_have_the_weights(
    broker: BrokerProcess, start_instance: Start, tmp_path: Path
) -> None:
    instances = [start_instance(f"i{number}") for number in range(INSTANCES)]
    for instance in instances:
        instance.call(actions.prepare)
    for instance in instances:
        instance.begin(actions.acquire_or_load, "model", 1, load_until=str(tmp_path / "loaded"))
    eventually(lambda: broker.host().waiting_acquisition_count == INSTANCES - 1)
    (tmp_path / "loaded").touch()
    results = [instance.result() for instance in instances]
    assert Counter(source for source, _, _ in results) == {"disk": 1, "peer": INSTANCES - 1}
    assert sum(loads for _, _, loads in results) == 1
    assert {checksum for _, checksum, _ in results} == {actions.expected(1)}
    assert broker.host().cold_load_lease_count == 0
    assert len(broker.publications()) == INSTANCES, "receivers are sources too"


def test_when_the_loader_is_killed_exactly_one_other_is_told_to_load(
    broker: BrokerProcess, start_instance: Start, tmp_path: Path
) -> None:
    instances = [start_instance(f"i{number}") for number in range(5)]
    for instance in instances:
        instance.call(actions.prepare)
        instance.begin(actions.acquire_or_load, "model", 1, load_until=str(tmp_path / "loaded"))
    eventually(lambda: broker.host().waiting_acquisition_count == 4)
    (holder,) = {
        weight_set.cold_load_lease.instance_id
        for weight_set in broker.inspection.ListWeightSets(inspection.ListWeightSetsRequest()).weight_sets
    }
    pid = next(instance.pid for instance in broker.instances() if instance.instance_id == holder)
    loader = next(instance for instance in instances if instance.pid == pid)
    loader.kill()
    (tmp_path / "loaded").touch()
    results = [instance.result() for instance in instances if instance is not loader]
    assert Counter(source for source, _, _ in results) == {"disk": 1, "peer": 3}
    assert {checksum for _, checksum, _ in results} == {actions.expected(1)}


def test_a_loader_that_raises_gives_the_lease_up_at_once(
    broker: BrokerProcess, start_instance: Start, tmp_path: Path
) -> None:
    """Long before the lease, which is for half an hour, would have ended by itself."""
    failing, waiting = start_instance("failing"), start_instance("waiting")
    for instance in (failing, waiting):
        instance.call(actions.prepare)
    failing.begin(actions.acquire_or_load, "model", 1, load_until=str(tmp_path / "failed"), fail=True)
    eventually(lambda: broker.host().cold_load_lease_count == 1)
    waiting.begin(actions.acquire_or_load, "model", 1)
    eventually(lambda: broker.host().waiting_acquisition_count == 1)
    (tmp_path / "failed").touch()
    source, checksum, _ = waiting.result()
    assert (source, checksum) == ("disk", actions.expected(1))
    with pytest.raises(RemoteError, match="OSError: the disk is gone"):
        failing.result()


def test_a_lease_that_is_given_up_goes_to_the_next_waiter_with_a_larger_token(
    broker: BrokerProcess, start_instance: Start
) -> None:
    first, second = start_instance("first"), start_instance("second")
    for instance in (first, second):
        instance.call(actions.prepare)
    token = first.call(actions.take_lease, "model")
    second.begin(actions.take_lease, "model")
    eventually(lambda: broker.host().waiting_acquisition_count == 1)
    first.call(actions.give_up_lease)
    assert second.result() > token > 0


def test_a_lease_whose_holder_hangs_expires(start_broker: Callable[..., BrokerProcess], start_instance: Start) -> None:
    start_broker(WEIGHT_BROKER_LIMITS_COLD_LOAD_LEASE_SECONDS="1")
    first, second = start_instance("first"), start_instance("second")
    for instance in (first, second):
        instance.call(actions.prepare)
    begun = time.monotonic()
    assert first.call(actions.take_lease, "model")
    assert second.call(actions.take_lease, "model")
    assert time.monotonic() - begun >= 1.0, "the lease was the first one's until then"
