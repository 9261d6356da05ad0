"""Does an acquire move bytes as fast as a plain parallel copy between the same buffers?

The plain copy is one memmove per tensor on as many threads, from the same resident memory, which it has mapped and
touched before. The budget is for the bandwidth of copying and verifying; the whole call is shown beside it.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.harness import InstanceProcess, Options, running_broker, running_instances
from benchmarks.measure import Samples, interleaved
from benchmarks.report import Budget, Row, number, size
from benchmarks.weights import Tensors, model_shapes, plain_copy, publish_random, size_of, touched, untouched

from weight_broker import BrokerClient, WeightSetKey
from weight_broker.memory.host.copying import thread_count

LEAST_SHARE = 0.9


def run(options: Options) -> list[Row]:
    """See the module."""
    shapes = model_shapes(options.size_bytes)
    key = WeightSetKey("copy-bandwidth")
    with running_broker() as broker, running_instances(broker, 1, "publisher") as (publisher,):
        _publish(publisher, key, options.size_bytes)
        tensors = touched(shapes)
        with (
            BrokerClient(broker.runtime_directory, name="automatic") as automatic,
            BrokerClient(broker.runtime_directory, name="sampled", digest_mode="sampled") as sampled,
        ):
            plain = plain_copy(automatic, key, tensors)
            moving: dict[str, list[float]] = {"auto": [], "sampled": []}

            def acquire(mode: str, client: BrokerClient) -> float:
                report = client.acquire(key, tensors)
                moving[mode].append(report.phases["transfer"] + report.phases["verify"])
                return report.seconds

            rounds = 2 * options.rounds
            seconds = interleaved(
                {
                    "auto": lambda: acquire("auto", automatic),
                    "memmove": plain.memmove,
                    "sampled": lambda: acquire("sampled", sampled),
                    "torch": plain.torch_copy,
                },
                rounds=rounds,
                warm_up=2,
            )
            verified = str(automatic.acquire(key, tensors).verified)
            fresh = _into_fresh_tensors(options, lambda made: automatic.acquire(key, made).seconds)
            plain.close()
    size_bytes = size_of(tensors)
    conditions = f"{size(size_bytes)}, {len(tensors)} tensors, pre-touched, {thread_count()} threads"
    plain_bandwidth = f"{_bandwidth(size_bytes, seconds['memmove'])} memmove"
    rows = []
    for mode, digests in (("auto", f"{verified} digests"), ("sampled", "sampled digests")):
        copying = Samples(tuple(moving[mode][-rounds:]))
        share = seconds["memmove"].ratio_to(copying)
        rows.append(
            Row(
                f"acquire, digest mode {mode}: copying and verifying",
                _bandwidth(size_bytes, copying),
                plain_bandwidth,
                f"{number(share)} x",
                Budget(share, LEAST_SHARE, "x the bandwidth", at_least=True),
                f"{conditions}, {digests}",
            )
        )
        rows.append(
            Row(
                f"acquire, digest mode {mode}: the whole call",
                _bandwidth(size_bytes, seconds[mode]),
                plain_bandwidth,
                f"{number(seconds['memmove'].ratio_to(seconds[mode]))} x",
                conditions="the same acquires; what is not copying has a budget of its own (overhead)",
            )
        )
    rows.append(
        Row(
            "acquire, digest mode auto: the whole call",
            _bandwidth(size_bytes, seconds["auto"]),
            f"{_bandwidth(size_bytes, seconds['torch'])} torch copy_",
            f"{number(seconds['torch'].ratio_to(seconds['auto']))} x",
            conditions=f"{conditions}, torch's own threads",
        )
    )
    rows.append(
        Row(
            "acquire into untouched tensors, against filling them with ones",
            _bandwidth(size_bytes, fresh["acquire"]),
            _bandwidth(size_bytes, fresh["fill"]),
            f"{number(fresh['fill'].ratio_to(fresh['acquire']))} x",
            conditions="not pre-touched: the kernel gives out every page while the clock runs",
        )
    )
    return rows


def _publish(publisher: InstanceProcess, key: WeightSetKey, size_bytes: int) -> None:
    publisher.call(publish_random, key.model, model_shapes(size_bytes))


def _into_fresh_tensors(options: Options, acquire: Callable[[Tensors], float]) -> dict[str, Samples]:
    shapes = model_shapes(options.size_bytes)

    def fill() -> None:
        touched(shapes)

    return interleaved({"acquire": lambda: acquire(untouched(shapes)), "fill": fill}, rounds=3, warm_up=0)


def _bandwidth(size_bytes: int, samples: Samples) -> str:
    low, high = (size_bytes / samples.quantile(share) / 1e9 for share in (0.9, 0.1))
    return f"{number(size_bytes / samples.median / 1e9)} GB/s [{number(low)} .. {number(high)}]"
