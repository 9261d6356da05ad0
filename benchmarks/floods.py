"""What do floods by one hostile process cost an honest one?

A flooder also takes a processor for itself, which no broker can prevent. So the budget compares with a process that is
as busy and leaves the broker alone; the ratio to a quiet machine is shown beside it.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.flooder import FLOODS
from benchmarks.harness import Broker, Options, processor_seconds, running_broker, running_instances
from benchmarks.measure import Samples
from benchmarks.report import Budget, Row, milliseconds, number
from benchmarks.weights import Tensors, equal_shapes, publish_random, touched

from weight_broker import BrokerClient, WeightSetKey
from weight_broker.v1 import inspection_service_pb2 as inspection

MOST_RATIO = 2.0
_OPERATIONS = 150
_OPERATIONS_PER_ATTACH = 6
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
                self._try(found["GetHost without a token"], self._get_host)
                if number_of_operation % _OPERATIONS_PER_ATTACH == 0:
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
    quiet, flooded, busy = _Latencies(), _Latencies(), _Latencies()
    shares: list[float] = []
    with running_broker() as broker, running_instances(broker, 1, "publisher") as (publisher,):
        publisher.call(publish_random, "measured", _SHAPES)
        honest = _Honest(broker)
        honest.measure()
        for _ in range(max(1, rounds // 3)):
            quiet.add(honest.measure())
            with flooding(broker.runtime_directory, flood) as flooder:
                begun, used = time.perf_counter(), processor_seconds(flooder)
                flooded.add(honest.measure())
                shares.append((processor_seconds(flooder) - used) / (time.perf_counter() - begun))
            with hostile("benchmarks.busy", str(shares[-1]), says=b"busy"):
                busy.add(honest.measure())
    for what in quiet.samples:
        yield _row(f"{flood}: {what}", quiet[what], flooded[what], busy[what], statistics.mean(shares), honest.failures)


def _row(what: str, quiet: Samples, flooded: Samples, busy: Samples, share: float, failures: list[str]) -> Row:
    ratio = flooded.median / busy.median
    return Row(
        what,
        _quantiles(flooded),
        _quantiles(busy),
        number(ratio),
        Budget(ratio, MOST_RATIO, "times the p50 beside a busy process"),
        f"{number(flooded.median / quiet.median)} times the p50 without either ({milliseconds(quiet.median)}); "
        f"the flooder used {share:.0%} of a processor; {len(failures)} of all calls failed"
        + (f": {failures[0]}" if failures else ""),
    )


def _quantiles(samples: Samples) -> str:
    return f"p50 {milliseconds(samples.median)}, p99 {milliseconds(samples.quantile(0.99))}"


class _Latencies:
    """Of all rounds, by what was done."""

    def __init__(self) -> None:
        self.samples: dict[str, list[float]] = {}

    def add(self, latencies: dict[str, list[float]]) -> None:
        """Those of a round."""
        for name, values in latencies.items():
            self.samples.setdefault(name, []).extend(values)

    def __getitem__(self, name: str) -> Samples:
        return Samples(tuple(self.samples[name]))


def flooding(directory: Path, flood: str) -> contextlib.AbstractContextManager[int]:
    """A hostile process for the length of a block; its pid."""
    return hostile("benchmarks.flooder", str(directory), flood, says=b"flooding")


@contextlib.contextmanager
def hostile(module: str, *arguments: str, says: bytes) -> Iterator[int]:
    """A process beside the honest one; its pid. The block begins once it has said that it does what it is there for."""
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != says + b"\n":
            raise RuntimeError(f"{command} has ended with {process.wait()}")
        yield process.pid
    finally:
        process.kill()
        process.communicate()
