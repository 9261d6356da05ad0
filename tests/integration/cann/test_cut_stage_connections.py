"""A stage connection that is cut between two steps of a call is a lost connection: the call is repeated, once."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import device_instance as instance
from support import stage_cuts
from support.broker_process import BrokerProcess
from support.card_process import CardProcess
from support.device_host import DeviceHost, wait_until_idle
from support.device_instance import Tensor
from support.waiting import eventually

MODEL = [Tensor("a", (1 << 19,)), Tensor("b", (777, 333), "int8")]

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def pair(device_host: DeviceHost) -> tuple[BrokerProcess, CardProcess, CardProcess]:
    """A broker, an instance with the weights and one without, both with memory that has to be staged."""
    broker = device_host.start_broker()
    first, second = device_host.start_instance("first"), device_host.start_instance("second")
    first.call(instance.create, "model", 0, MODEL, 7, sleeps=True)
    second.call(instance.create, "model", 1, MODEL, None, sleeps=True)
    return broker, first, second


def assert_same(first: CardProcess, second: CardProcess) -> None:
    assert second.call(instance.digest, "model") == first.call(instance.digest, "model")


def test_before_the_broker_is_asked_it_costs_neither_publisher_nor_receiver_anything(
    device_host: DeviceHost, pair: tuple[BrokerProcess, CardProcess, CardProcess]
) -> None:
    broker, first, second = pair
    for one in (first, second):
        one.call(stage_cuts.cut_next, 1)
    assert first.call(instance.publish, "model").error == ""
    filled = second.call(instance.acquire, "model")
    assert (filled.error, filled.path) == ("", "staged")
    assert_same(first, second)
    assert broker.host().instance_count == 2, "the sessions went on"
    assert first.call(instance.retract, "model").error == ""
    wait_until_idle(broker)
    assert device_host.cann.violations() == []


def test_while_a_receiver_waits_it_costs_the_receiver_nothing(
    pair: tuple[BrokerProcess, CardProcess, CardProcess], tmp_path: Path
) -> None:
    broker, first, second = pair
    assert first.call(instance.acquire_or_lease, "model").source == "lease"
    second.call(stage_cuts.cut_when_told, str(tmp_path))
    answer = second.begin(instance.acquire, "model")
    eventually(lambda: broker.host().waiting_acquisition_count == 1)
    (tmp_path / "cut").touch()
    eventually((tmp_path / "done").exists)
    assert first.call(instance.publish, "model").error == ""
    assert answer(60).error == ""
    assert_same(first, second)


def test_a_connection_that_is_cut_again_and_again_is_an_unavailable_broker_and_nothing_is_touched(
    pair: tuple[BrokerProcess, CardProcess, CardProcess],
) -> None:
    _, first, second = pair
    assert first.call(instance.publish, "model").error == ""
    before = second.call(instance.digest, "model")
    second.call(stage_cuts.cut_next, 2)
    failed = second.call(instance.acquire, "model")
    assert (failed.error, failed.touched, failed.quiesced) == ("BrokerUnavailable", False, True)
    assert second.call(instance.digest, "model") == before
    second.call(stage_cuts.cut_next, 2)
    assert second.call(instance.publish, "model").error == "BrokerUnavailable"
    assert second.call(instance.acquire, "model").error == ""
    assert_same(first, second)
