"""What does the digest of a checkpoint cost, relative to the load that it decides about?

The default is the sample. Why it is not every byte: `full digest, then the load` over a cold load has to be below 1.1
for that, with the page cache that the digest leaves behind.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.checkpoint import checkpoint, load, make_cold, make_warm
from benchmarks.harness import Options
from benchmarks.measure import interleaved
from benchmarks.report import Budget, Row, number, size
from benchmarks.weights import model_shapes, size_of, touched

from weight_broker.integrations.checkpoint import checkpoint_digest
from weight_broker.integrations.checkpoint.cache import ENVIRONMENT_VARIABLE

REMEMBERED_SHARE = 0.01
"""Of a cold load."""
_SETTLING_SECONDS = 2.5


def run(options: Options) -> list[Row]:
    """See the module."""
    tensors = touched(model_shapes(options.size_bytes))
    with (
        checkpoint(options.checkpoint_directory, options.size_bytes) as file,
        tempfile.TemporaryDirectory() as caches,
    ):
        os.environ[ENVIRONMENT_VARIABLE] = str(Path(caches) / "digests.json")
        directory = file.parent

        def timed(prepare: Callable[[Path], object], *steps: Callable[[], object]) -> Callable[[], float]:
            def once() -> float:
                prepare(file)
                begun = time.perf_counter()
                for step in steps:
                    step()
                return time.perf_counter() - begun

            return once

        def sampled() -> str:
            return checkpoint_digest(directory, cache=False)

        def full() -> str:
            return checkpoint_digest(directory, cache=False, full=True)

        def read() -> None:
            load(file, tensors)

        time.sleep(_SETTLING_SECONDS)  # a file that has just been written is not remembered
        checkpoint_digest(directory)
        seconds = interleaved(
            {
                "load": timed(make_cold, read),
                "remembered": timed(make_cold, lambda: checkpoint_digest(directory)),
                "sampled, cold": timed(make_cold, sampled),
                "sampled, warm": timed(make_warm, sampled),
                "full, cold": timed(make_cold, full),
                "full, warm": timed(make_warm, full),
                "sampled, then load": timed(make_cold, sampled, read),
                "full, then load": timed(make_cold, full, read),
            },
            rounds=options.rounds,
        )
    conditions = f"{size(size_of(tensors))}, {len(tensors)} tensors; load: page cache cold"
    return [
        Row(
            f"digest: {arm}",
            str(seconds[arm]),
            str(seconds["load"]),
            f"{number(seconds[arm].ratio_to(seconds['load']))} x",
            Budget(seconds[arm].ratio_to(seconds["load"]), REMEMBERED_SHARE, "of a cold load")
            if arm == "remembered"
            else None,
            conditions,
        )
        for arm in seconds
        if arm != "load"
    ]
