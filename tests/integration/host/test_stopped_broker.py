"""A broker that is stopped, not dead, costs a call what its caller allows: every step waits within the one deadline."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from support.broker_process import BrokerProcess
from weight_broker import AcquireTimeout, BrokerClient, BrokerUnavailable, ColdLoadLease, RetractTimeout, WeightSetKey
from weight_broker.connection import attach
from weight_broker.connection.deadline import LAST_WORD_SECONDS
from weight_broker.connection.session import Session
from weight_broker.transfers import calls

KEY = WeightSetKey("model")
TIMEOUT = 0.5


class Waits:
    """For how long each step of the calls may wait; one that a stopped broker does not answer waits so long."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds: dict[str, list[float]] = {}
        exchange, stub = attach.AttachConnection._exchange, vars(Session)["stub"].fget

        def noted_exchange(connection: Any, packet: bytes, fds: Any, timeout: float, deadline: float) -> Any:
            self._note("attach socket", timeout)
            return exchange(connection, packet, fds, timeout, deadline)

        waits = self

        class Noted:
            def __init__(self, stub: Any) -> None:
                self._stub = stub

            def __getattr__(self, name: str) -> Callable[..., Any]:
                def call(request: object, *, timeout: float, metadata: object) -> Any:
                    waits._note(name, timeout)
                    return getattr(self._stub, name)(request, timeout=timeout, metadata=metadata)

                return call

        require_answer = calls.require_answer

        def noted_question(session: Session, timeout: float) -> None:
            self._note("GetHost", timeout)
            require_answer(session, timeout)

        monkeypatch.setattr(calls, "require_answer", noted_question)
        monkeypatch.setattr(attach.AttachConnection, "_exchange", noted_exchange)
        monkeypatch.setattr(Session, "stub", property(lambda session: Noted(stub(session))))

    def _note(self, step: str, seconds: float) -> None:
        self.seconds.setdefault(step, []).append(seconds)

    @property
    def total(self) -> float:
        return sum(map(sum, self.seconds.values()))


@contextmanager
def stopped(broker: BrokerProcess) -> Iterator[None]:
    os.kill(broker.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(broker.pid, signal.SIGCONT)


def arrays() -> dict[str, object]:
    return {"w": np.ones(1000, np.float32)}


def write(weights: dict[str, object]) -> None:
    """A load from disk."""
    array = weights["w"]
    assert isinstance(array, np.ndarray)
    array.fill(2)


@pytest.mark.parametrize("is_attached", [True, False])
def test_acquiring(broker: BrokerProcess, is_attached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with BrokerClient(broker.runtime_directory) as client:
        if is_attached:
            client._attachment.session()
        waits = Waits(monkeypatch)
        with stopped(broker), pytest.raises(AcquireTimeout if is_attached else BrokerUnavailable):
            client.acquire(KEY, arrays(), timeout=TIMEOUT)
        assert waits.seconds
        assert waits.total <= TIMEOUT + LAST_WORD_SECONDS


@pytest.mark.parametrize("is_attached", [True, False])
def test_publishing(broker: BrokerProcess, is_attached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with BrokerClient(broker.runtime_directory) as client:
        if is_attached:
            client._attachment.session()
        waits = Waits(monkeypatch)
        with stopped(broker), pytest.raises(BrokerUnavailable):
            client.publish(KEY, arrays(), timeout=TIMEOUT)
        assert waits.seconds
        assert waits.total <= TIMEOUT + LAST_WORD_SECONDS
        assert not client.publish(WeightSetKey("another"), arrays()).is_retracted
        assert [publication.weight_set_id for publication in broker.publications()] == [WeightSetKey("another").id]


def test_retracting(broker: BrokerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    with BrokerClient(broker.runtime_directory) as client:
        publication = client.publish(KEY, arrays())
        waits = Waits(monkeypatch)
        with stopped(broker), pytest.raises(RetractTimeout):
            publication.retract(timeout=TIMEOUT)
        assert waits.total <= TIMEOUT
        publication.retract()
    assert broker.publications() == []


def test_after_a_timeout_the_broker_is_asked_whether_it_lives_before_anything_is_copied(
    broker: BrokerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client waited for the load of another, and the broker stops while this process loads."""
    with (
        BrokerClient(broker.runtime_directory) as holder,
        BrokerClient(broker.runtime_directory, connect_timeout=0.2) as client,
    ):
        client._attachment.session()
        lease = holder.acquire_or_lease(KEY, arrays())
        assert isinstance(lease, ColdLoadLease)
        waits, weights = Waits(monkeypatch), arrays()

        def load() -> None:
            os.kill(broker.pid, signal.SIGSTOP)
            write(weights)

        try:
            report = client.acquire_or_load(KEY, weights, load, timeout=TIMEOUT)
        finally:
            os.kill(broker.pid, signal.SIGCONT)
        assert report.acquire_error is not None
        assert report.acquire_error.startswith("AcquireTimeout")
        assert report.publish_error is not None
        assert report.publish_error.startswith("BrokerUnavailable")
        assert set(waits.seconds) == {"Acquire", "GetHost"}, "nothing was handed over"
        assert waits.seconds["GetHost"] == [0.2]
        client.publish(KEY, arrays())
        lease.give_up()


def test_loading_costs_no_more_than_acquiring_and_nothing_is_copied_for_publishing(
    broker: BrokerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    with BrokerClient(broker.runtime_directory) as client:
        client._attachment.session()
        waits, weights = Waits(monkeypatch), arrays()
        with stopped(broker):
            report = client.acquire_or_load(KEY, weights, lambda: write(weights), timeout=TIMEOUT)
        assert (report.source, report.publication) == ("disk", None)
        assert report.publish_error is not None
        assert report.publish_error.startswith("BrokerUnavailable")
        assert set(waits.seconds) == {"Acquire", "GetHost"}
        assert waits.total <= TIMEOUT + LAST_WORD_SECONDS
