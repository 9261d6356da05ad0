"""How long does real vLLM take to load a model, from disk and through the broker, and to its first token?

`make benchmark-vllm`, in the environment of `make test-vllm`. Every measurement is an engine of its own, in its own
process; the ways take turns, so that none has the quiet machine to itself. The state of the page cache is made before
each run and measured.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.harness import machine_facts, running_broker

from support.vllm_models import write_qwen2
from support.vllm_process import EngineProcess
from weight_broker.demo.page_cache import evict, resident_share

Way = Callable[[], EngineProcess]
COLUMNS = ("load_seconds", "engine_seconds", "first_token_seconds")


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.vllm_load", description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", default=5, type=int, help="runs of each way (default 5)")
    parser.add_argument("--shape", default="big", choices=("tiny", "big"), help="which model (default big: 1.7 GB)")
    parser.add_argument("--model", type=Path, help="a checkpoint to use instead of one with random weights")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weight-broker-vllm-")))
        model = arguments.model or write_qwen2(directory / "model", shape=arguments.shape)
        files = sorted(model.glob("*.safetensors"))
        broker = stack.enter_context(running_broker())
        absent = directory / "absent"

        def start(runtime_directory: Path, **options: Any) -> EngineProcess:
            engine = EngineProcess(runtime_directory, {"model": str(model), "tokens": 2, **options})
            stack.callback(engine.close)
            return engine.start()

        def cold(runtime_directory: Path, **options: Any) -> EngineProcess:
            evict(files)
            print(f"  page cache holds {resident_share(files) or 0.0:.0%} of the checkpoint", file=sys.stderr)
            return start(runtime_directory, **options)

        def warm(runtime_directory: Path, **options: Any) -> EngineProcess:
            for file in files:
                file.read_bytes()
            return start(runtime_directory, **options)

        through = {"load_format": "weight_broker"}
        mapped = {**through, "model_loader_extra_config": {"zero_copy": True}}
        size_bytes = sum(file.stat().st_size for file in files)
        published = start(broker.runtime_directory, **through, hold=True).result(3600)
        ways: dict[str, Way] = {
            "disk, cold page cache": lambda: cold(absent),
            "disk, warm page cache": lambda: warm(absent),
            "no broker, warm page cache": lambda: warm(absent, **through),
            "peer, copied": lambda: cold(broker.runtime_directory, **through),
            "peer, mapped": lambda: cold(broker.runtime_directory, **mapped),
        }
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
        for number in range(arguments.rounds):
            for name, way in ways.items():
                engine = way()
                results[name].append(engine.result(3600))
                engine.close()
                print(f"round {number + 1}, {name}: {_shown(results[name][-1])}", file=sys.stderr)
        digests = {one["digest"] for found in results.values() for one in found} | {published["digest"]}
    facts = machine_facts()
    print(
        f"{facts['processors']} processors ({facts['processor_model']}), load average {os.getloadavg()[0]:.0f}; "
        f"{size_bytes} bytes; medians of {arguments.rounds} runs, fastest and slowest; "
        f"answers {'identical' if len(digests) == 1 else 'DIFFER'}"
    )
    print("| weights from | load | engine ready after imports | process start to first token |")
    print("|---|---|---|---|")
    for name, found in results.items():
        cells = [_spread([float(one[column]) for one in found]) for column in COLUMNS]
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"| first engine: disk, then published | {' | '.join(f'{published[column]:.2f} s' for column in COLUMNS)} |")
    return int(len(digests) != 1)


def _shown(result: dict[str, Any]) -> str:
    return ", ".join(f"{column} {result[column]:.2f}" for column in COLUMNS)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    sys.exit(main())
