"""What does the daemon cost: start, processor time when idle, memory?"""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.harness import Options, running_broker, running_instances
from benchmarks.measure import interleaved
from benchmarks.report import Budget, Row, number
from benchmarks.weights import equal_shapes, publish_random, touched

from weight_broker import BrokerClient, WeightSetKey

MOST_START_SECONDS = 1.5
MOST_IDLE_PERCENT = 1.0
MOST_RESIDENT_MEGABYTES = 120.0
_INSTANCES = 4
_IDLE_SECONDS = 10.0
_ACQUIRES = 200


def run(options: Options) -> list[Row]:
    """See the module."""

    def start() -> float:
        with running_broker() as broker:
            return broker.ready_seconds

    seconds = interleaved({"start": start, "imports": _import_libraries}, rounds=options.rounds)
    shapes = equal_shapes(400, 256)
    with running_broker() as broker, running_instances(broker, _INSTANCES) as instances:
        at_start = broker.resident_bytes()
        for index, instance in enumerate(instances):
            instance.call(publish_random, f"model-{index}", shapes)
        with BrokerClient(broker.runtime_directory, name="receiver") as client:
            tensors = touched(shapes)
            for index in range(_ACQUIRES):
                client.acquire(WeightSetKey(f"model-{index % _INSTANCES}"), tensors)
        time.sleep(1.0)  # what the acquires left to do is done
        used = broker.processor_seconds()
        time.sleep(_IDLE_SECONDS)
        idle_percent = (broker.processor_seconds() - used) / _IDLE_SECONDS * 100
        resident = broker.resident_bytes()
        attached = broker.host().instance_count
    if attached != _INSTANCES:
        raise AssertionError(f"{attached} instances were attached, not {_INSTANCES}")
    start_seconds = seconds["start"]
    return [
        Row(
            "daemon, from start to READY",
            str(start_seconds),
            f"{seconds['imports']} for Python importing grpc and protobuf",
            f"{number(start_seconds.ratio_to(seconds['imports']))} x",
            Budget(start_seconds.median, MOST_START_SECONDS, "s p50"),
            "page cache warm",
        ),
        Row(
            f"daemon, idle with {_INSTANCES} attached instances",
            f"{number(idle_percent)} %",
            budget=Budget(idle_percent, MOST_IDLE_PERCENT, "% of a processor"),
            conditions=f"over {_IDLE_SECONDS:.0f} s",
        ),
        Row(
            "daemon, resident memory",
            f"{number(resident / 1e6)} MB",
            f"{number(at_start / 1e6)} MB after start",
            f"{number(resident / at_start)} x",
            Budget(resident / 1e6, MOST_RESIDENT_MEGABYTES, "MB"),
            f"{_INSTANCES} instances, {_INSTANCES} publications of 400 tensors, after {_ACQUIRES} acquires",
        ),
    ]


def _import_libraries() -> None:
    subprocess.run([sys.executable, "-c", "import asyncio, grpc.aio, google.protobuf.message"], check=True)
