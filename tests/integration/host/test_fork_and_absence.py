"""Inference never depends on the broker: forks, absent brokers and slow starts cost little and break nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support import actions, fork_actions
from support.broker_process import BrokerProcess
from support.instance_process import InstanceProcess
from support.waiting import eventually
from weight_broker import BrokerUnavailable

Start = Callable[..., InstanceProcess]


def test_a_forked_child_is_an_instance_of_its_own(broker: BrokerProcess, start_instance: Start) -> None:
    parent = start_instance("parent")
    parent.call(actions.publish, "model", 1)
    parent.call(actions.acquire, "model")
    assert parent.call(fork_actions.acquire_in_child, "model") == actions.expected(1)
    eventually(lambda: len(broker.instances()) == 1, within=2)
    assert len(broker.publications()) == 1, "the child's end does not end what the parent published"
    parent.call(actions.acquire, "model")
    assert parent.call(actions.current) == actions.expected(1)


def test_a_forked_child_cannot_retract_what_its_parent_published(broker: BrokerProcess, start_instance: Start) -> None:
    parent = start_instance("parent")
    parent.call(actions.publish, "model", 1)
    assert "only that process can retract it" in parent.call(fork_actions.retract_in_child)
    assert len(broker.publications()) == 1


def test_a_child_that_survives_its_parent_does_not_keep_the_parents_publications(
    broker: BrokerProcess, start_instance: Start
) -> None:
    parent = start_instance("parent")
    parent.call(actions.publish, "model", 1)
    child = parent.call(fork_actions.child_that_lingers, 5.0)
    parent.kill()
    eventually(lambda: not broker.publications(), within=1.0)
    os.kill(child, 0)  # the child, which inherited the attach socket, is still there


def test_publishing_goes_on_in_a_forked_child_after_a_restart_of_the_broker(
    broker: BrokerProcess, start_instance: Start
) -> None:
    parent = start_instance("parent")
    parent.call(actions.publish, "model", 1)
    child = parent.call(fork_actions.child_that_lingers, 8.0)
    broker.kill()
    broker.start()
    eventually(lambda: len(broker.publications()) == 1, within=3)
    os.kill(child, 0)
    assert len(broker.instances()) == 1, "only the parent came back by itself"


def test_without_a_broker_the_weights_come_from_disk_at_once(start_instance: Start) -> None:
    instance = start_instance("alone")
    instance.call(actions.prepare)
    begun = time.monotonic()
    assert instance.call(actions.acquire_or_load, "model", 1) == ("disk", actions.expected(1), 1)
    assert time.monotonic() - begun < 1.0
    with pytest.raises(BrokerUnavailable) as failed:
        instance.call(actions.acquire, "model")
    assert not failed.value.touched


def test_the_time_that_an_absent_broker_costs_is_below_200_ms(tmp_path: Path) -> None:
    program = (
        "import time, numpy, sys\n"
        "from weight_broker import BrokerClient, WeightSetKey\n"
        "client = BrokerClient(sys.argv[1]); tensors = {f'w{i}': numpy.zeros(16) for i in range(400)}\n"
        "begun = time.perf_counter()\n"
        "report = client.acquire_or_load(WeightSetKey('model'), tensors, lambda: None)\n"
        "assert report.source == 'disk'\n"
        "print(time.perf_counter() - begun)\n"
    )
    seconds = [
        float(subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(seconds) < 0.2, seconds
