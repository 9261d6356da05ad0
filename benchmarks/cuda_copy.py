"""Does an acquire on a GPU move bytes as fast as a plain device copy?

The plain copy is one `Tensor.copy_` per tensor from tensors of the same GPU (or, where there are two, of the other one)
in one process, and one wait. The budget is for the bandwidth of moving; verifying and the whole call are shown beside
it. It needs an NVIDIA GPU and a CUDA build of torch: `make benchmark-gpu`.
"""

from __future__ import annotations

import torch
from benchmarks.harness import Instance, Options, running_broker, running_instances
from benchmarks.measure import Samples, interleaved
from benchmarks.report import Budget, Row, number, size
from benchmarks.weights import Shapes, model_shapes

from weight_broker import BrokerClient, WeightSetKey

LEAST_SHARE = 0.9

Tensors = dict[str, torch.Tensor]


def run(options: Options) -> list[Row]:
    """See the module."""
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs an NVIDIA GPU and a CUDA build of torch")
    rows: list[Row] = []
    for source in range(min(torch.cuda.device_count(), 2)):
        rows += _between(options, source, 0)
        torch.cuda.empty_cache()
    return rows


def _between(options: Options, source: int, destination: int) -> list[Row]:
    shapes = model_shapes(options.size_bytes)
    key = WeightSetKey("cuda-copy", revision=str(source))
    with (
        running_broker(WEIGHT_BROKER_CUDA_ENABLED="on") as broker,
        running_instances(broker, 1, "publisher") as (publisher,),
        BrokerClient(broker.runtime_directory, name="receiver") as client,
    ):
        checksum = publisher.call(_publish, key, shapes, source)
        tensors, plain_source = _empty(shapes, destination), _empty(shapes, source)
        phases: dict[str, list[float]] = {"map": [], "transfer": [], "verify": []}

        def acquire() -> float:
            report = client.acquire(key, tensors)
            for phase, values in phases.items():
                values.append(report.phases.get(phase, 0.0))
            return report.seconds

        def plain() -> None:
            for name, tensor in tensors.items():
                tensor.copy_(plain_source[name], non_blocking=True)
            torch.cuda.synchronize(destination)

        rounds = 2 * options.rounds
        seconds = interleaved({"plain": plain, "acquire": acquire}, rounds=rounds, warm_up=2)
        acquire()
        if _checksum(tensors) != checksum:
            raise AssertionError("what arrived is not what was sent")
        size_bytes = sum(tensor.nbytes for tensor in tensors.values())
    moving = Samples(tuple(phases["transfer"][2 : 2 + rounds]))
    share = seconds["plain"].ratio_to(moving)
    where = "within a GPU" if source == destination else "from another GPU"
    conditions = f"{size(size_bytes)}, {len(tensors)} tensors, {torch.cuda.get_device_name(destination)}"
    baseline = f"{_bandwidth(size_bytes, seconds['plain'])} copy_"
    rows = [
        Row(
            f"acquire {where}: moving",
            _bandwidth(size_bytes, moving),
            baseline,
            f"{number(share)} x",
            Budget(share, LEAST_SHARE, "x the bandwidth", at_least=True),
            conditions,
        ),
        Row(
            f"acquire {where}: the whole call",
            _bandwidth(size_bytes, seconds["acquire"]),
            baseline,
            f"{number(seconds['plain'].ratio_to(seconds['acquire']))} x",
            conditions=conditions,
        ),
    ]
    for phase in ("map", "verify"):
        samples = Samples(tuple(phases[phase][2 : 2 + rounds]))
        rows.append(Row(f"acquire {where}: {phase}", f"{number(samples.median * 1e3)} ms", conditions=conditions))
    return rows


def _publish(instance: Instance, key: WeightSetKey, shapes: Shapes, device: int) -> list[int]:
    """Makes this instance a source; runs in an instance process."""
    generator = torch.Generator(device=f"cuda:{device}").manual_seed(1)
    tensors = _empty(shapes, device)
    for tensor in tensors.values():
        tensor.view(torch.int16).random_(-(1 << 15), 1 << 15, generator=generator)
    instance.kept[key.revision] = instance.client.publish(key, tensors, timeout=300)
    return _checksum(tensors)


def _empty(shapes: Shapes, device: int) -> Tensors:
    return {name: torch.empty(shape, dtype=torch.bfloat16, device=f"cuda:{device}") for name, shape in shapes.items()}


def _checksum(tensors: Tensors) -> list[int]:
    """Differs if a word of a tensor does, or is at another place."""
    found = []
    for name in sorted(tensors):
        words = tensors[name].view(torch.int16).flatten().to(torch.int64)
        places = torch.arange(1, len(words) + 1, device=words.device)
        found.append(int((words * places).sum()))
    return found


def _bandwidth(size_bytes: int, samples: Samples) -> str:
    low, high = (size_bytes / samples.quantile(share) / 1e9 for share in (0.9, 0.1))
    return f"{number(size_bytes / samples.median / 1e9)} GB/s [{number(low)} .. {number(high)}]"
