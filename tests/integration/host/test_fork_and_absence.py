"""Inference never depends on the broker: forks, absent brokers and slow starts cost little and break nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from support import actions, fork_actions
from support.broker_process import BrokerProcess
from support.instance_process import InstanceProcess
from support.waiting import eventually
from weight_broker import BrokerUnavailable

Start = Callable[..., InstanceProcess]


@contextmanager
def child_of(parent: InstanceProcess) -> Iterator[int]:
    """A forked child that does nothing, and is there until the end of the block."""
    child = parent.call(fork_actions.child_that_lingers)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_forked_child_is_an_instance_of_its_own(broker: BrokerProcess, start_instance: Start) -> None:
    parent = start_instance("parent")
    parent.call(actions.publish, "model", 1)
    parent.call(actions.acquire, "model")
    assert parent.call(fork_actions.acquire_in_child, "model") == actions.expected(1)
    eventually(lambda: len(broker.instances()) == 1)
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
    with child_of(parent):  # which inherited the attach socket
        parent.kill()
        eventually(lambda: not broker.publications())


def test_publishing_goes_on_in_a_forked_child_after_a_restart_of_the_broker(
    broker: BrokerProcess, start_instance: Start
) -> None:
    parent = start_instance("parent")
    parent.call(actions.publish, "model", 1)
    with child_of(parent):
        broker.kill()
        broker.start()
        eventually(lambda: len(broker.publications()) == 1)
        assert len(broker.instances()) == 1, "only the parent came back by itself"


def test_without_a_broker_the_weights_come_from_disk_at_once(start_instance: Start) -> None:
    instance = start_instance("alone")
    instance.call(actions.prepare)
    answer = instance.call(actions.acquire_or_load, "model", 1, timeout=600.0)  # more than this test waits for it
    assert answer == ("disk", actions.expected(1), 1)
    with pytest.raises(BrokerUnavailable) as failed:
        instance.call(actions.acquire, "model")
    assert not failed.value.touched
