"""How soon after kill -9 of an instance are its publications gone from the listing?"""

from __future__ import annotations

import os
import select
import time

from benchmarks.harness import Broker, InstanceProcess, Options, running_broker
from benchmarks.measure import Samples
from benchmarks.report import Budget, Row, number
from benchmarks.weights import equal_shapes, publish_random

from weight_broker.v1 import inspection_service_pb2 as inspection

MOST_SECONDS = 1.0
_PUBLICATIONS = 4
_TENSOR_BYTES = 1 << 20


def run(options: Options) -> list[Row]:
    """See the module."""
    gone: list[float] = []
    ended: list[float] = []
    with running_broker() as broker:
        for number_of_round in range(options.rounds):
            instance = InstanceProcess(broker, f"victim-{number_of_round}")
            try:
                for index in range(_PUBLICATIONS):
                    instance.call(publish_random, f"model-{index}", equal_shapes(64, _TENSOR_BYTES), index)
                if _listed(broker) != _PUBLICATIONS:
                    raise AssertionError(f"{_listed(broker)} publications are listed, not {_PUBLICATIONS}")
                process_ended, publications_gone = _kill_and_watch(broker, instance)
            finally:
                instance.close()
            ended.append(process_ended)
            gone.append(publications_gone)
    samples, kernel = Samples(tuple(gone)), Samples(tuple(ended))
    return [
        Row(
            "kill -9 of an instance until nothing of it is listed",
            str(samples),
            f"{kernel} until the kernel has ended it",
            f"{number(samples.ratio_to(kernel))} x",
            Budget(max(gone), MOST_SECONDS, f"s, slowest of {len(gone)}"),
            f"{_PUBLICATIONS} publications of 64 MiB",
        )
    ]


def _kill_and_watch(broker: Broker, instance: InstanceProcess) -> tuple[float, float]:
    """Seconds from the signal until the process has ended, and until its publications are not listed any more."""
    descriptor = os.pidfd_open(instance.pid)
    try:
        begun = time.perf_counter()
        instance.kill()
        select.select([descriptor], [], [], 10.0)
        ended = time.perf_counter() - begun
    finally:
        os.close(descriptor)
    while _listed(broker):
        if time.perf_counter() - begun > 10.0:
            raise AssertionError("the publications of a dead instance stay listed")
        time.sleep(0.001)
    return ended, time.perf_counter() - begun


def _listed(broker: Broker) -> int:
    answer = broker.inspection.ListWeightSets(inspection.ListWeightSetsRequest(page_size=1000), timeout=10)
    return sum(len(weight_set.publications) for weight_set in answer.weight_sets)
