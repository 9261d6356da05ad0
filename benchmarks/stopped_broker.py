"""What does a call cost when the broker is stopped, not dead? It has a deadline, and should cost no more."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable

import numpy as np
from benchmarks.harness import Broker, Options, running_broker
from benchmarks.report import Budget, Row, number

from weight_broker import BrokerClient, BrokerError, WeightSetKey

MOST_SECONDS_OVER = 0.5
_RESIDENT, _ABSENT = WeightSetKey("resident"), WeightSetKey("absent")


def _tensors() -> dict[str, object]:
    return {"w": np.zeros(1 << 20, np.float32)}


def _acquire(client: BrokerClient, timeout: float) -> None:
    client.acquire(_RESIDENT, _tensors(), timeout=timeout)


def _load(client: BrokerClient, timeout: float) -> None:
    client.acquire_or_load(_RESIDENT, _tensors(), lambda: None, timeout=timeout)


def _attach(client: BrokerClient, timeout: float) -> None:
    client.attach_tensors(_RESIDENT, framework="numpy", timeout=timeout)


def _publish(client: BrokerClient, timeout: float) -> None:
    client.publish(_ABSENT, _tensors(), timeout=timeout)


_CALLS: tuple[tuple[str, Callable[[BrokerClient, float], None]], ...] = (
    ("acquire", _acquire),
    ("acquire_or_load", _load),
    ("attach_tensors", _attach),
    ("publish", _publish),
)


def run(options: Options) -> list[Row]:
    """See the module."""
    rows = []
    for name, call in _CALLS:
        for is_attached in (False, True):
            for timeout in (0.1, 1.0):
                seconds = _measure(call, is_attached, timeout)
                rows.append(
                    Row(
                        f"{name}(timeout={timeout:g})",
                        f"{number(seconds)} s",
                        budget=Budget(seconds - timeout, MOST_SECONDS_OVER, "s over the deadline"),
                        conditions="attached before" if is_attached else "first call",
                    )
                )
    return rows


def _measure(call: Callable[[BrokerClient, float], None], is_attached: bool, timeout: float) -> float:
    with running_broker() as broker, BrokerClient(broker.runtime_directory) as source:
        source.publish(_RESIDENT, _tensors())
        client = BrokerClient(broker.runtime_directory)
        if is_attached:
            client.acquire(_RESIDENT, _tensors())
        seconds = _seconds_while_stopped(broker, client, call, timeout)
        client.close()
        return seconds


def _seconds_while_stopped(
    broker: Broker, client: BrokerClient, call: Callable[[BrokerClient, float], None], timeout: float
) -> float:
    os.kill(broker.process.pid, signal.SIGSTOP)
    try:
        begun = time.perf_counter()
        with contextlib.suppress(BrokerError):
            call(client, timeout)
        return time.perf_counter() - begun
    finally:
        os.kill(broker.process.pid, signal.SIGCONT)
