"""Sixteen instances start at once: how often is the disk read, and how long until all have their weights?"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.checkpoint import checkpoint, load, make_cold, page_cache_state
from benchmarks.harness import (
    Instance,
    InstanceProcess,
    Options,
    available_memory_bytes,
    running_broker,
    running_instances,
)
from benchmarks.measure import Samples
from benchmarks.report import Budget, Row, number, size
from benchmarks.weights import model_shapes, touched

from weight_broker import ColdLoadLease, WeightSetKey
from weight_broker.demo.checkpoint import model_shape
from weight_broker.transfers.exchange import Request

INSTANCES = 16
MOST_ACQUIRES = 3.0
_MEMORY_SHARE = 0.4
"""Of the memory that is available; every instance has the tensors, and one has them twice."""
_SMALLEST_BYTES = 64 << 20
_ROUNDS = 3
_PAUSE_SECONDS = 0.5
"""From the order to start until the start, so that all have heard it."""


@dataclass(frozen=True, slots=True)
class Start:
    """How one instance got its weights."""

    ended_at: float
    """Monotonic seconds, the same clock in all processes."""
    seconds: float
    from_disk: bool
    read_bytes: int
    """What the kernel says that this process had fetched from storage."""
    publish_seconds: float = 0.0
    """What the one that loaded from disk took to become a source."""


@dataclass(frozen=True, slots=True)
class Wave:
    """How all of them did."""

    seconds: float
    disk_loads: int
    read_bytes: int
    publish_seconds: float


def run(options: Options) -> list[Row]:
    """See the module."""
    affordable = int(available_memory_bytes() * _MEMORY_SHARE / (INSTANCES + 2)) >> 26 << 26
    size_bytes = max(_SMALLEST_BYTES, min(options.size_bytes, affordable))
    cold: list[float] = []
    acquire: list[float] = []
    waves: dict[str, list[Wave]] = {"copy": [], "zero-copy": [], "no broker": []}
    left = 0.0
    with (
        checkpoint(options.checkpoint_directory, size_bytes) as file,
        running_broker() as broker,
        running_instances(broker, INSTANCES) as instances,
    ):
        for instance in instances:
            instance.call(prepare, size_bytes)
        for number_of_round in range(-1, _ROUNDS):
            left = max(left, make_cold(file))
            alone = instances[0].call(start_alone, file)
            found: dict[str, Wave] = {}
            for kind in waves:
                if kind == "no broker" and number_of_round != 0:
                    continue  # it takes longer than all the others together
                left = max(left, make_cold(file))
                found[kind] = _wave(instances, kind, f"{kind}-{number_of_round}", file)
                if kind == "copy":
                    one = instances[-1].call(acquire_once, f"{kind}-{number_of_round}")
                for instance in instances:
                    instance.call(leave)
            if number_of_round >= 0:
                cold.append(alone)
                acquire.append(one)
                for kind, wave in found.items():
                    waves[kind].append(wave)
    state = page_cache_state(left)
    total = size(model_shape(size_bytes).size_bytes)
    conditions = f"{INSTANCES} processes, {total} each, pre-touched, {state}"
    limit = Samples(tuple(load_ + MOST_ACQUIRES * one_ for load_, one_ in zip(cold, acquire, strict=True)))
    rows = [_disk_row(waves["copy"], total, conditions)]
    without = waves["no broker"][0].seconds
    for kind, what in (("copy", "acquire_or_load"), ("zero-copy", "attach or load and publish")):
        samples = Samples(tuple(wave.seconds for wave in waves[kind]))
        publishing = Samples(tuple(wave.publish_seconds for wave in waves[kind]))
        rows.append(
            Row(
                f"{INSTANCES} simultaneous starts, {what}",
                str(samples),
                f"{Samples(tuple(cold))} for one cold load, {Samples(tuple(acquire))} for one acquire",
                f"{number(samples.median / without)} x the time without a broker ({number(without)} s, once)",
                Budget(samples.ratio_to(limit), 1.0, "x (cold load + 3 acquires)"),
                f"{conditions}; of that {publishing} in publishing",
            )
        )
    return rows


def _disk_row(waves: list[Wave], total: str, conditions: str) -> Row:
    loads = max(wave.disk_loads for wave in waves)
    read = max(wave.read_bytes for wave in waves)
    return Row(
        f"{INSTANCES} simultaneous starts, loads from disk",
        f"{loads} loads, {size(read)} read from storage",
        total,
        budget=Budget(loads, 1, "loads from disk"),
        conditions=conditions,
    )


def _wave(instances: list[InstanceProcess], kind: str, model: str, file: Path) -> Wave:
    begin_at = time.monotonic() + _PAUSE_SECONDS
    for instance in instances:
        instance.begin(start, kind, model, file, begin_at)
    starts: list[Start] = [instance.result() for instance in instances]
    return Wave(
        max(one.ended_at for one in starts) - begin_at,
        sum(one.from_disk for one in starts),
        sum(one.read_bytes for one in starts),
        max(one.publish_seconds for one in starts),
    )


# What follows runs in the instance processes.


def prepare(instance: Instance, size_bytes: int) -> None:
    """Makes the tensors and attaches."""
    instance.kept["tensors"] = touched(model_shapes(size_bytes))
    instance.kept["publications"] = []


def start_alone(instance: Instance, file: Path) -> float:
    """A load without a broker; its seconds."""
    begun = time.monotonic()
    load(file, instance.kept["tensors"])
    return time.monotonic() - begun


def start(instance: Instance, kind: str, model: str, file: Path, begin_at: float) -> Start:
    """Gets the weights, at a time that all have agreed on."""
    tensors, key = instance.kept["tensors"], WeightSetKey(model)
    read_before = _read_bytes()
    publish_seconds = 0.0
    time.sleep(max(0.0, begin_at - time.monotonic()))
    match kind:
        case "copy":
            report = instance.client.acquire_or_load(key, tensors, lambda: load(file, tensors))
            instance.kept["publications"].append(report.publication)
            from_disk = report.source == "disk"
            publish_seconds = report.publish_seconds
        case "zero-copy":
            outcome = instance.client._exchange.map(Request(key), "torch")
            from_disk = isinstance(outcome, ColdLoadLease)
            if isinstance(outcome, ColdLoadLease):
                outcome.prepare_memory(sum(tensor.nbytes for tensor in tensors.values()))
                load(file, tensors)
                loaded = time.monotonic()
                instance.kept["publications"].append(instance.client.publish(key, tensors, lease=outcome))
                publish_seconds = time.monotonic() - loaded
            else:
                instance.kept["attached"] = outcome.tensors
        case _:
            load(file, tensors)
            from_disk = True
    ended = time.monotonic()
    return Start(ended, ended - begin_at, from_disk, _read_bytes() - read_before, publish_seconds if from_disk else 0.0)


def acquire_once(instance: Instance, model: str) -> float:
    """An acquire while nothing else happens; its seconds."""
    return instance.client.acquire(WeightSetKey(model), instance.kept["tensors"]).seconds


def leave(instance: Instance) -> None:
    """Gives up everything of a round."""
    while instance.kept["publications"]:
        publication = instance.kept["publications"].pop()
        if publication is not None:
            publication.retract()
    instance.kept.pop("attached", None)


def _read_bytes() -> int:
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    return 0
