"""How long does it take until tensors are there that are views of the resident memory?"""

from __future__ import annotations

import mmap
import os

import torch
from benchmarks.harness import Options, running_broker, running_instances
from benchmarks.measure import interleaved
from benchmarks.report import Budget, Row, number, size
from benchmarks.weights import model_shapes, publish_random, size_of, touched

from weight_broker import BrokerClient, WeightSetKey
from weight_broker.memory.host.export import SharedWeights
from weight_broker.transfers.exchange import Mapped, Request

MOST_MILLISECONDS = 20.0


def run(options: Options) -> list[Row]:
    """See the module."""
    shapes = model_shapes(options.size_bytes)
    key = WeightSetKey("zero-copy")
    with running_broker() as broker, running_instances(broker, 1, "publisher") as (publisher,):
        publisher.call(publish_random, key.model, shapes)
        tensors = touched(shapes)
        with (
            BrokerClient(broker.runtime_directory, name="receiver") as client,
            BrokerClient(broker.runtime_directory, name="careful", digest_mode="full") as careful,
        ):
            outcome = client._exchange.map(Request(key, keep=True), "torch")
            assert isinstance(outcome, Mapped)
            shared = outcome.shared
            assert isinstance(shared, SharedWeights)
            descriptor = os.dup(shared.descriptors[0])
            places = [
                (spec.shape, spec.storage_bytes // 2, offset)
                for spec, (_, offset) in zip(shared.layout, shared.placements, strict=True)
            ]
            shared.close()

            def plain() -> None:
                mapping = mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
                for shape, count, offset in places:
                    torch.frombuffer(mapping, dtype=torch.bfloat16, count=count, offset=offset).view(shape)

            seconds = interleaved(
                {
                    "attach": lambda: client.attach_tensors(key).report.seconds,
                    "plain": plain,
                    "full": lambda: careful.attach_tensors(key).report.seconds,
                    "acquire": lambda: client.acquire(key, tensors).seconds,
                },
                rounds=3 * options.rounds,
                warm_up=2,
            )
            os.close(descriptor)
    conditions = f"{size(size_of(tensors))}, {len(tensors)} tensors; no destination memory"
    attach, plain_seconds = seconds["attach"], seconds["plain"]
    return [
        Row(
            "zero-copy attach",
            str(attach),
            f"{plain_seconds} for mmap and views alone",
            f"{number(attach.ratio_to(plain_seconds))} x",
            Budget(attach.median * 1e3, MOST_MILLISECONDS, "ms p50"),
            f"{conditions}; a sample of every tensor verified",
        ),
        Row(
            "zero-copy attach, digest mode full (reads every byte)",
            str(seconds["full"]),
            f"{seconds['acquire']} for an acquire, pre-touched",
            f"{number(seconds['full'].ratio_to(seconds['acquire']))} x",
            conditions=conditions,
        ),
    ]
