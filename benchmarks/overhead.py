"""What does an acquire cost besides copying, and how soon is a miss known?"""

from __future__ import annotations

import time
from collections.abc import Callable

from benchmarks.harness import Options, running_broker, running_instances
from benchmarks.measure import Samples, interleaved
from benchmarks.report import Budget, Row, number, size
from benchmarks.weights import Tensors, equal_shapes, publish_random, touched

from weight_broker import BrokerClient, WeightSetKey
from weight_broker.errors import WeightsNotFound

TENSORS = 400
TINY_BYTES = 256
LARGE_BYTES = 4 << 20
MOST_MILLISECONDS = 5.0
_ROUNDS = 40
_COPY_SECONDS = 0.1
"""About what copying the large tensors takes."""


def run(options: Options) -> list[Row]:
    """See the module."""
    tiny_key, large_key, absent_key = WeightSetKey("tiny"), WeightSetKey("large"), WeightSetKey("absent")
    with running_broker() as broker, running_instances(broker, 1, "publisher") as (publisher,):
        publisher.call(publish_random, tiny_key.model, equal_shapes(TENSORS, TINY_BYTES))
        publisher.call(publish_random, large_key.model, equal_shapes(TENSORS, LARGE_BYTES))
        tiny, large = touched(equal_shapes(TENSORS, TINY_BYTES)), touched(equal_shapes(TENSORS, LARGE_BYTES))
        with BrokerClient(broker.runtime_directory, name="receiver") as client:
            seconds = interleaved(
                {
                    "tiny": lambda: _without_copying(client, tiny_key, tiny),
                    "miss": lambda: _miss(client, absent_key, tiny),
                    "call": lambda: _timed(broker.host),
                },
                rounds=10 * _ROUNDS,
                warm_up=20,
            )
            with_copy = interleaved(
                {
                    "large": lambda: _without_copying(client, large_key, large),
                    "call": lambda: _timed(broker.host),
                },
                rounds=_ROUNDS,
                warm_up=2,
            )
            phases = client.acquire(large_key, large).phases
            rested = interleaved({"call": lambda: _after_a_pause(broker.host)}, rounds=_ROUNDS)["call"]
    listed = ", ".join(f"{name} {number(spent * 1e3)}" for name, spent in phases.items())
    total = size(TENSORS * LARGE_BYTES)
    return [
        _row(f"acquire of {TENSORS} tiny tensors, without copying", seconds["tiny"], seconds["call"], "pre-touched"),
        _row(
            f"acquire of {TENSORS} tensors of 4 MiB, without copying",
            with_copy["large"],
            with_copy["call"],
            f"{total}, pre-touched; an empty call after as long a pause: {rested}; the last one in ms: {listed}",
        ),
        _row(
            f"miss: acquire of an absent key, {TENSORS} tensors", seconds["miss"], seconds["call"], "nothing is touched"
        ),
    ]


def _row(what: str, samples: Samples, call: Samples, conditions: str) -> Row:
    median = samples.median * 1e3
    return Row(
        what,
        str(samples),
        f"{call} for an empty call",
        f"{number(samples.ratio_to(call))} x",
        Budget(median, MOST_MILLISECONDS, "ms p50"),
        conditions,
    )


def _without_copying(client: BrokerClient, key: WeightSetKey, tensors: Tensors) -> float:
    """Seconds of a whole acquire but for its transfer phase, in which bytes are copied and digested."""
    begun = time.perf_counter()
    report = client.acquire(key, tensors)
    return time.perf_counter() - begun - report.phases["transfer"]


def _miss(client: BrokerClient, key: WeightSetKey, tensors: Tensors) -> float:
    begun = time.perf_counter()
    try:
        client.acquire(key, tensors, wait=False)
    except WeightsNotFound:
        return time.perf_counter() - begun
    raise AssertionError(f"{key.model} was found")


def _after_a_pause(call: Callable[[], object]) -> float:
    """Both sides of a connection take longer to answer after they have slept, whatever is asked."""
    time.sleep(_COPY_SECONDS)
    return _timed(call)


def _timed(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun
