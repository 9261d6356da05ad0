"""How much faster than loading the same checkpoint from disk is an acquire?"""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.checkpoint import COLD_SHARE, checkpoint, load, make_cold, make_warm, page_cache_state
from benchmarks.harness import Instance, Options, running_broker, running_instances
from benchmarks.measure import interleaved
from benchmarks.report import Budget, Row, number, size
from benchmarks.weights import model_shapes, size_of, touched

from weight_broker import BrokerClient, WeightSetKey

LEAST_SPEED_UP = 10.0


def run(options: Options) -> list[Row]:
    """See the module."""
    shapes = model_shapes(options.size_bytes)
    key = WeightSetKey("cold-load")
    resident_shares: list[float] = []
    with (
        checkpoint(options.checkpoint_directory, options.size_bytes) as file,
        running_broker() as broker,
        running_instances(broker, 1, "publisher") as (publisher,),
    ):
        publisher.call(publish_checkpoint, key.model, options.size_bytes, file)
        tensors = touched(shapes)

        def cold() -> float:
            resident_shares.append(make_cold(file))
            begun = time.perf_counter()
            load(file, tensors)
            return time.perf_counter() - begun

        def warm() -> float:
            make_warm(file)
            begun = time.perf_counter()
            load(file, tensors)
            return time.perf_counter() - begun

        with BrokerClient(broker.runtime_directory, name="receiver") as client:
            seconds = interleaved(
                {
                    "cold": cold,
                    "acquire": lambda: client.acquire(key, tensors).seconds,
                    "attach": lambda: client.attach_tensors(key).report.seconds,
                    "warm": warm,
                },
                rounds=options.rounds,
            )
    sizes = f"{size(size_of(tensors))}, {len(tensors)} tensors"
    coldest = max(resident_shares)
    rows = []
    for arm, what, destination in (
        ("acquire", "acquire", "pre-touched"),
        ("attach", "zero-copy attach", "no destination memory"),
    ):
        for baseline, state in (("cold", page_cache_state(coldest)), ("warm", "page cache warm")):
            speed_up = seconds[baseline].ratio_to(seconds[arm])
            judged = baseline == "cold" and coldest <= COLD_SHARE
            rows.append(
                Row(
                    f"{what}, against a load with a {baseline} page cache",
                    str(seconds[arm]),
                    str(seconds[baseline]),
                    f"{number(speed_up)} x faster",
                    Budget(speed_up, LEAST_SPEED_UP, "x faster", at_least=True) if judged else None,
                    f"{sizes}, {destination}; load: safetensors.load_file and copy_, pre-touched, {state}",
                )
            )
    return rows


def publish_checkpoint(instance: Instance, model: str, size_bytes: int, file: Path) -> None:
    """Loads the checkpoint and becomes its source; runs in an instance process."""
    tensors = touched(model_shapes(size_bytes))
    load(file, tensors)
    instance.kept[model] = instance.client.publish(WeightSetKey(model), tensors, timeout=300)
