"""What do floods by one hostile process cost an honest one?"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.flooder import FLOODS
from benchmarks.harness import Broker, Options, running_broker, running_instances
from benchmarks.measure import Samples
from benchmarks.report import Budget, Row, milliseconds, number
from benchmarks.weights import Tensors, equal_shapes, publish_random, touched

from weight_broker import BrokerClient, WeightSetKey
from weight_broker.v1 import inspection_service_pb2 as inspection

MOST_RATIO = 2.0
_OPERATIONS = 150
_PAUSE_SECONDS = 0.005
_SHAPES = equal_shapes(4, 256)


def run(options: Options) -> list[Row]:
    """See the module."""
    return [row for flood in FLOODS for row in _measure(flood, options.rounds)]


class _Honest:
    """One client, its latencies and its failures."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._key = WeightSetKey("measured")
        self._tensors: Tensors = touched(_SHAPES)
        self.failures: list[str] = []

    def measure(self) -> dict[str, list[float]]:
        """Acquires, inspections and attachments in turn."""
        found: dict[str, list[float]] = {"acquire": [], "GetHost without a token": [], "attach": []}
        with BrokerClient(self._broker.runtime_directory, name="honest") as client:
            self._try(found["attach"], lambda: client.acquire(self._key, self._tensors))
            for number_of_operation in range(_OPERATIONS):
                self._try(found["acquire"], lambda: client.acquire(self._key, self._tensors))
                time.sleep(_PAUSE_SECONDS)
                self._try(
                    found["GetHost without a token"],
                    lambda: self._broker.inspection.GetHost(inspection.GetHostRequest()),
                )
                if number_of_operation % 15 == 0:
                    self._try(found["attach"], self._attach)
        return found

    def _get_host(self) -> None:
        self._broker.inspection.GetHost(inspection.GetHostRequest())

    def _attach(self) -> None:
        with BrokerClient(self._broker.runtime_directory, name="newcomer") as client:
            client.acquire(self._key, self._tensors)

    def _try(self, latencies: list[float], action: object) -> None:
        begun = time.perf_counter()
        try:
            action()  # type: ignore[operator]
        except Exception as error:  # noqa: BLE001 - of any kind: it is counted
            self.failures.append(f"{type(error).__name__}: {error}")
        latencies.append(time.perf_counter() - begun)


def _measure(flood: str, rounds: int) -> Iterator[Row]:
    quiet: dict[str, list[float]] = {}
    flooded: dict[str, list[float]] = {}
    with running_broker() as broker, running_instances(broker, 1, "publisher") as (publisher,):
        publisher.call(publish_random, "measured", _SHAPES)
        honest = _Honest(broker)
        honest.measure()
        for _ in range(max(1, rounds // 3)):
            _add(quiet, honest.measure())
            with flooding(broker.runtime_directory, flood):
                _add(flooded, honest.measure())
    for what in quiet:
        before, during = Samples(tuple(quiet[what])), Samples(tuple(flooded[what]))
        ratio = during.median / before.median
        yield Row(
            f"{flood}: {what}",
            f"p50 {milliseconds(during.median)}, p99 {milliseconds(during.quantile(0.99))}",
            f"p50 {milliseconds(before.median)}, p99 {milliseconds(before.quantile(0.99))}",
            number(ratio),
            Budget(ratio, MOST_RATIO, "times the p50"),
            f"{len(honest.failures)} of all calls failed" + (f": {honest.failures[0]}" if honest.failures else ""),
        )


def _add(all_latencies: dict[str, list[float]], latencies: dict[str, list[float]]) -> None:
    for name, values in latencies.items():
        all_latencies.setdefault(name, []).extend(values)


@contextlib.contextmanager
def flooding(directory: Path, flood: str) -> Iterator[None]:
    """A hostile process for the length of a block."""
    command = [sys.executable, "-m", "benchmarks.flooder", str(directory), flood]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != b"flooding\n":
            raise RuntimeError(f"the flood {flood} has ended with {process.wait()}")
        yield
    finally:
        process.kill()
        process.communicate()
