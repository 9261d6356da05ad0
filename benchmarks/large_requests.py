"""What do the largest requests of one process cost a bystander?

Each is measured beside the same process with a second broker, which keeps the processors as busy and leaves the
bystander's broker alone.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.harness import Broker, Options, running_broker, running_instances
from benchmarks.large_loads import LOADS
from benchmarks.measure import Samples
from benchmarks.report import Budget, Row, milliseconds
from benchmarks.weights import equal_shapes, publish_random, touched

from weight_broker import BrokerClient, WeightSetKey
from weight_broker.v1 import inspection_service_pb2 as inspection

MOST_MILLISECONDS = 100.0
_ROUND_SECONDS = 8.0
_PAUSE_SECONDS = 0.005
_SHAPES = equal_shapes(4, 256)
_MODEL = "measured"

Latencies = dict[str, list[float]]


def run(options: Options) -> list[Row]:
    """See the module."""
    return [row for load in LOADS for row in _measure(load, options.rounds)]


def _measure(load: str, rounds: int) -> Iterator[Row]:
    beside: Latencies = {}
    loaded: Latencies = {}
    with running_broker() as broker, running_broker() as other, running_instances(broker, 1) as (publisher,):
        publisher.call(publish_random, _MODEL, _SHAPES)
        for _ in range(max(1, rounds // 2)):
            for target, latencies in ((other, beside), (broker, loaded)):
                with loading(target.runtime_directory, load):
                    _bystand(broker, latencies)
    for what, values in loaded.items():
        during, before = Samples(tuple(values)), Samples(tuple(beside[what]))
        p99 = during.quantile(0.99)
        yield Row(
            f"{load}: {what} of a bystander",
            _shown(during),
            _shown(before),
            budget=Budget(p99 * 1e3, MOST_MILLISECONDS, "ms p99"),
            conditions=f"{len(values)} calls; baseline: the load goes to another broker",
        )


def _shown(samples: Samples) -> str:
    quantiles = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return ", ".join(f"{name} {milliseconds(samples.quantile(share))}" for name, share in quantiles.items())


def _bystand(broker: Broker, latencies: Latencies) -> None:
    """Small calls, one after the other, for some seconds."""
    tensors = touched(_SHAPES)
    key = WeightSetKey(_MODEL)
    with BrokerClient(broker.runtime_directory, name="bystander") as client:
        calls: dict[str, Callable[[], object]] = {
            "acquire": lambda: client.acquire(key, tensors),
            "GetHost": lambda: broker.inspection.GetHost(inspection.GetHostRequest()),
            "ListWeightSets": lambda: broker.inspection.ListWeightSets(inspection.ListWeightSetsRequest()),
        }
        client.acquire(key, tensors)
        end = time.perf_counter() + _ROUND_SECONDS
        while time.perf_counter() < end:
            for name, call in calls.items():
                begun = time.perf_counter()
                call()
                latencies.setdefault(name, []).append(time.perf_counter() - begun)
                time.sleep(_PAUSE_SECONDS)


@contextlib.contextmanager
def loading(directory: Path, load: str) -> Iterator[None]:
    """A process with the load for the length of a block."""
    command = [sys.executable, "-m", "benchmarks.large_loads", str(directory), load]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != b"loading\n":
            raise RuntimeError(f"the load {load} has ended with {process.wait()}")
        yield
    finally:
        process.kill()
        process.communicate()
