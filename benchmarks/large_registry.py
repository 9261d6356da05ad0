"""Do ten thousand publications slow an acquire down, and how long does a page of them take to list?"""

from __future__ import annotations

import os
import resource
import time

from benchmarks.harness import Broker, Instance, Options, running_broker, running_instances
from benchmarks.measure import Samples, interleaved
from benchmarks.report import Budget, Row, number
from benchmarks.weights import equal_shapes, publish_random, random_content, touched

from weight_broker import BrokerClient, WeightSetKey
from weight_broker.digest import ContentDigests
from weight_broker.memory.host.export import SharedWeights, export
from weight_broker.memory.tensors import describe
from weight_broker.v1 import inspection_service_pb2 as inspection

PUBLICATIONS = 10_000
PAGE_SIZE = 1000
MOST_PAGE_MILLISECONDS = 50.0
MOST_RATIO = 1.1
"""Up to this ratio a latency counts as unchanged: what two daemons that know the same differ by here."""
_PUBLISHERS = 4
_CLIENTS_PER_PUBLISHER = 5
_ROUNDS = 200
_SHAPES = equal_shapes(400, 256)
_SMALL_SHAPES = equal_shapes(4, 256)


def run(options: Options) -> list[Row]:
    """See the module."""
    key = WeightSetKey("measured")
    with (
        running_broker() as small,
        running_broker() as large,
        running_instances(small, 1, "source") as (alone,),
        running_instances(large, 1, "source") as (among_many,),
        running_instances(large, _PUBLISHERS, "publisher") as publishers,
    ):
        for source in (alone, among_many):
            source.call(publish_random, key.model, _SHAPES)
        each = PUBLICATIONS // _PUBLISHERS
        for index, publisher in enumerate(publishers):
            publisher.begin(publish_many, f"other-{index}", each)
        for publisher in publishers:
            publisher.result()
        count = large.host().publication_count
        if count != each * _PUBLISHERS + 1:
            raise AssertionError(f"{count} publications, not {each * _PUBLISHERS + 1}")
        resident = large.resident_bytes()
        tensors = touched(_SHAPES)
        with (
            BrokerClient(small.runtime_directory, name="receiver") as with_one,
            BrokerClient(large.runtime_directory, name="receiver") as with_many,
        ):
            acquires = interleaved(
                {
                    "many": lambda: with_many.acquire(key, tensors).seconds,
                    "one": lambda: with_one.acquire(key, tensors).seconds,
                },
                rounds=_ROUNDS,
                warm_up=20,
            )
        pages = _page_seconds(large)
        parsing = _page_seconds(large, page_size=1)
    ratio = acquires["many"].median / acquires["one"].median
    return [
        Row(
            f"acquire of 400 tiny tensors with {count} publications, against 1",
            str(acquires["many"]),
            str(acquires["one"]),
            f"{number(ratio)} x",
            Budget(ratio, MOST_RATIO, "x the p50"),
            f"pre-touched; the daemon has {number(resident / 1e6)} MB resident",
        ),
        Row(
            f"a page of {PAGE_SIZE} of {count} weight sets",
            str(pages),
            f"{parsing} for a page of 1",
            f"{number(pages.median / parsing.median)} x",
            Budget(pages.median * 1e3, MOST_PAGE_MILLISECONDS, "ms p50"),
            f"all {len(pages.values) // 3} pages, three times, decoded by the reader",
        ),
    ]


def publish_many(instance: Instance, prefix: str, count: int) -> None:
    """Offers the same memory under many keys; runs in an instance process."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    described = describe(random_content(_SMALL_SHAPES, 1))
    region = export(described)
    digests: tuple[ContentDigests, ...] = region.digests
    # An instance may hand over a limited number of regions.
    clients = [
        BrokerClient(instance.runtime_directory, name=f"{prefix}-{index}") for index in range(_CLIENTS_PER_PUBLISHER)
    ]
    instance.kept["clients"] = clients
    instance.kept["publications"] = [
        clients[index % len(clients)]._exchange.publish_shared(
            WeightSetKey(f"{prefix}-{index}"),
            SharedWeights(described.layout, [(os.dup(region.fd), region.size_bytes)], region.placements, digests),
        )
        for index in range(count)
    ]
    region.close()


def _page_seconds(broker: Broker, page_size: int = PAGE_SIZE) -> Samples:
    """Seconds for each page, of three walks through (the beginning of) the listing."""
    seconds: list[float] = []
    for _ in range(3):
        token = ""
        for _page in range(PUBLICATIONS // PAGE_SIZE):
            request = inspection.ListWeightSetsRequest(page_size=page_size, page_token=token)
            begun = time.perf_counter()
            token = broker.inspection.ListWeightSets(request, timeout=30).next_page_token
            seconds.append(time.perf_counter() - begun)
    return Samples(tuple(seconds))
