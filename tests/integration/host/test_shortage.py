"""A process without room for gRPC loads from disk and lives: gRPC itself would end it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support import actions, shortage
from support.broker_process import BrokerProcess
from support.instance_process import InstanceProcess

ADVICE = {"threads": "pids.max", "descriptors": "LimitNOFILE", "address space": "LimitAS"}


@pytest.mark.parametrize("limit", shortage.LIMITS)
def test_an_instance_at_a_limit_loads_from_disk_and_says_which(
    broker: BrokerProcess, start_instance: Callable[..., InstanceProcess], limit: str
) -> None:
    start_instance("source").call(actions.publish, "model", 1)
    instance = start_instance("limited")
    instance.call(actions.prepare)
    found = instance.call(shortage.acquire_or_load_at_the_limit, limit, "model", 1)
    assert (found["source"], found["checksum"]) == ("disk", actions.expected(1))
    assert found["error"].startswith("BrokerUnavailable")
    assert ADVICE[limit] in found["error"]
    assert instance.call(actions.current) == actions.expected(1), "the process lives"
