"""What becomes of staged transfers when somebody dies, hangs, retracts or restarts: bounded, all or nothing, over."""

from __future__ import annotations

import os
import signal

import pytest

from doubles.cann.control import Fault, card_name, is_alive
from support import device_instance as instance
from support.broker_process import BrokerProcess
from support.card_process import CardProcess
from support.device_host import DeviceHost, cards, wait_until_idle
from support.device_instance import Tensor
from support.waiting import eventually

MIB = 1 << 20
MODEL = [Tensor("a", (1 << 20,)), Tensor("b", (5 * MIB + 333,), "int8"), Tensor("c", (4 * MIB,), "int8")]
SLOW = 1.5 * MIB
"""Bytes per second: seconds for the model, and more than one for a chunk of 2 MiB."""
SMALL_BUFFER = {"WEIGHT_BROKER_CARDS_STAGING_BYTES": str(4 * MIB)}

pytestmark = pytest.mark.timeout(240)


def start(device_host: DeviceHost, request_seconds: str = "30") -> tuple[BrokerProcess, CardProcess, CardProcess]:
    """A staged source on card 0, and on card 1 an instance that will be filled."""
    broker = device_host.start_broker(settings={**SMALL_BUFFER, "WEIGHT_BROKER_CARDS_REQUEST_SECONDS": request_seconds})
    first, second = device_host.start_instance("first"), device_host.start_instance("second")
    first.call(instance.create, "model", 0, MODEL, 7, sleeps=True)
    second.call(instance.create, "model", 1, MODEL, None, sleeps=True)
    assert first.call(instance.publish, "model").error == ""
    return broker, first, second


def until_both_copy(*processes: CardProcess) -> None:
    """Both have mapped their staging buffer."""
    eventually(lambda: all(one.live.get("imports") for one in processes), within=60)


def until_nothing_is_mapped(*processes: CardProcess) -> None:
    """No staging buffer stays."""
    eventually(lambda: not any(one.live.get("imports") for one in processes))


def test_a_killed_receiver_and_then_a_killed_source(device_host: DeviceHost) -> None:
    broker, first, second = start(device_host)
    third = device_host.start_instance("third")
    third.call(instance.create, "model", 1, MODEL, None, sleeps=True)
    device_host.cann.inject(Fault.SLOW_LINK, card=1, value=SLOW)
    second.begin(instance.acquire, "model")
    until_both_copy(first, second)
    second.kill()
    eventually(lambda: not first.live.get("imports"))
    eventually(lambda: broker.host().running_transfer_count == 0)
    answer = third.begin(instance.acquire, "model")
    until_both_copy(first, third)
    first.kill()
    failed = answer(60)
    assert (failed.error, failed.quiesced) == ("TransferFailed" if failed.touched else "BrokerUnavailable", True)
    assert "imports" not in third.live
    device_host.cann.clear()
    wait_until_idle(broker)
    fourth = device_host.start_instance("fourth")
    fourth.call(instance.create, "model", 0, MODEL, 9, sleeps=True)
    assert fourth.call(instance.publish, "model").error == ""
    assert third.call(instance.acquire, "model").path == "staged"
    assert third.call(instance.digest, "model") == fourth.call(instance.digest, "model")
    assert device_host.cann.violations() == []


@pytest.mark.parametrize("role", ["receiver", "sender"])
def test_a_killed_card_process(device_host: DeviceHost, role: str) -> None:
    broker, first, second = start(device_host)
    device_host.cann.inject(Fault.SLOW_LINK, card=1, value=SLOW)
    answer = second.begin(instance.acquire, "model")
    until_both_copy(first, second)
    pid = cards(broker)[card_name(0)].sender_pid if role == "sender" else cards(broker)[card_name(1)].receiver_pids[0]
    os.kill(pid, signal.SIGKILL)
    failed = answer(60)
    assert (failed.error, failed.touched, failed.quiesced) == ("TransferFailed", True, True) or (
        (failed.error, failed.touched) == ("TransferFailed", False)  # killed before the first chunk had arrived
    )
    until_nothing_is_mapped(first, second)
    device_host.cann.clear()
    again = second.call(instance.acquire, "model")
    assert (again.error, again.path) == ("", "staged")
    assert second.call(instance.digest, "model") == first.call(instance.digest, "model")
    first.call(instance.retract, "model")
    wait_until_idle(broker)
    assert device_host.cann.violations() == []


def test_a_killed_broker_leaves_no_staging_buffer_mapped_and_its_successor_finds_the_source(
    device_host: DeviceHost,
) -> None:
    broker, first, second = start(device_host)
    device_host.cann.inject(Fault.SLOW_LINK, card=1, value=SLOW)
    answer = second.begin(instance.acquire, "model")
    until_both_copy(first, second)
    children = [cards(broker)[card_name(0)].sender_pid, *cards(broker)[card_name(1)].receiver_pids]
    broker.kill()
    failed = answer(60)
    assert (failed.error, failed.quiesced) == ("TransferFailed" if failed.touched else "BrokerUnavailable", True)
    until_nothing_is_mapped(first, second)
    eventually(lambda: not any(is_alive(pid) for pid in children))
    device_host.cann.clear()
    broker = device_host.start_broker(settings=SMALL_BUFFER)
    eventually(lambda: [one.is_staged for one in broker.publications()] == [True], within=60)
    again = second.call(instance.acquire, "model")
    assert (again.error, again.path) == ("", "staged")
    assert second.call(instance.digest, "model") == first.call(instance.digest, "model")


def test_a_retract_waits_for_the_staged_reader(device_host: DeviceHost) -> None:
    broker, first, second = start(device_host)
    device_host.cann.inject(Fault.SLOW_LINK, card=1, value=SLOW)
    answer = second.begin(instance.acquire, "model")
    until_both_copy(first, second)
    late = first.call(instance.retract, "model", timeout=0.5)
    assert late.error == "RetractTimeout"
    device_host.cann.clear()
    assert first.call(instance.retract, "model").error == ""
    assert answer(60).error == ""
    assert second.call(instance.digest, "model") == first.call(instance.digest, "model")
    first.call(instance.free, "model")
    wait_until_idle(broker)
    assert device_host.cann.violations() == []


def test_a_source_that_does_not_answer_is_no_source_until_it_does(device_host: DeviceHost) -> None:
    broker, first, second = start(device_host, request_seconds="6")
    first.process.send_signal(signal.SIGSTOP)
    failed = second.call(instance.acquire, "model")
    assert (failed.error, failed.quiesced) == ("TransferFailed" if failed.touched else "BrokerUnavailable", True)
    assert "did not answer" in failed.message
    assert broker.publications() == []
    first.process.send_signal(signal.SIGCONT)
    eventually(lambda: [one.is_staged for one in broker.publications()] == [True])
    again = second.call(instance.acquire, "model")
    assert (again.error, again.path) == ("", "staged")
    assert second.call(instance.digest, "model") == first.call(instance.digest, "model")


def test_a_staging_buffer_lives_until_an_instance_that_hangs_has_let_go_of_it(device_host: DeviceHost) -> None:
    """The driver takes a buffer from a process that uses it, and that process can do nothing more with its card."""
    broker, first, second = start(device_host, request_seconds="6")
    device_host.cann.inject(Fault.SLOW_LINK, card=1, value=SLOW)
    answer = second.begin(instance.acquire, "model")
    until_both_copy(first, second)
    first.process.send_signal(signal.SIGSTOP)  # with a chunk to copy, now or soon
    device_host.cann.clear()
    failed = answer(60)
    assert (failed.error, failed.quiesced) == ("TransferFailed" if failed.touched else "BrokerUnavailable", True)
    first.process.send_signal(signal.SIGCONT)
    eventually(lambda: [one.is_staged for one in broker.publications()] == [True])
    until_nothing_is_mapped(first, second)
    assert second.call(instance.acquire, "model").error == ""
    assert second.call(instance.digest, "model") == first.call(instance.digest, "model")
    assert device_host.cann.violations() == []


def test_an_overdue_transfer_ends_and_the_tensors_are_the_receivers_again(device_host: DeviceHost) -> None:
    broker, first, second = start(device_host)
    warm = device_host.start_instance("warm")  # so that the time is not spent on starting processes
    warm.call(instance.create, "model", 1, MODEL, None, sleeps=True)
    assert warm.call(instance.acquire, "model").error == ""
    device_host.cann.inject(Fault.SLOW_LINK, card=1, value=MIB / 8)
    late = second.call(instance.acquire, "model", timeout=8.0)
    assert (late.error, late.quiesced) == ("AcquireTimeout", True)
    assert "imports" not in second.live
    device_host.cann.clear()
    assert second.call(instance.acquire, "model").error == ""
    assert second.call(instance.digest, "model") == first.call(instance.digest, "model")
    first.call(instance.retract, "model")
    wait_until_idle(broker)
    assert device_host.cann.violations() == []
