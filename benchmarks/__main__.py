"""Measures the project's budgets: `python -m benchmarks [NAME...] [--size 1G] [--json FILE]`.

datasystem_overhead runs only if it is named: it needs the datasystem's wheel and gcc (`make benchmark-ascend`).

Every benchmark starts its own broker and instances, prints a table and cleans up. The last table has each budget as
measured / budget. The exit status is 0 whatever they say, unless --strict is given.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import Options, machine_facts
from benchmarks.report import Row, print_rows, print_summary, size, write_json

from weight_broker.demo.checkpoint import parse_size

BENCHMARKS = (
    "copy_bandwidth",
    "verification",
    "overhead",
    "zero_copy_attach",
    "cold_load",
    "checkpoint_identity",
    "simultaneous_starts",
    "daemon",
    "death",
    "stopped_broker",
    "large_registry",
    "floods",
    "large_requests",
)
ON_REQUEST = ("datasystem_overhead", "cuda_copy")
"""Need what not every machine has; see the modules."""


def main() -> int:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__, allow_abbrev=False)
    names = (*BENCHMARKS, *ON_REQUEST)
    parser.add_argument("names", metavar="NAME", nargs="*", choices=[*names, []], help=", ".join(names))
    parser.add_argument("--size", default="1G", type=parse_size, help="size of a weight set (default 1G)")
    parser.add_argument("--rounds", default=7, type=int, help="rounds of the expensive measurements (default 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there too")
    parser.add_argument("--strict", action="store_true", help="fail if a budget is missed")
    parser.add_argument(
        "--checkpoint-directory",
        type=Path,
        default=Path(tempfile.gettempdir()),
        metavar="DIR",
        help="where checkpoints are written for the time of a run; on a disk, not in memory (default %(default)s)",
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that everything is cleaned up
    options = Options(arguments.size, arguments.checkpoint_directory, arguments.rounds)
    facts = machine_facts()
    print(
        f"{facts['processors']} processors ({facts['processor_model']}), "
        f"{size(float(str(facts['memory_available_bytes'])))} of memory available, load {facts['load_average']}"
    )
    results: dict[str, list[Row]] = {}
    for name in arguments.names or BENCHMARKS:
        module = importlib.import_module(f"benchmarks.{name}")
        begun = time.monotonic()
        results[name] = module.run(options)
        title = (module.__doc__ or name).splitlines()[0]
        took = f"{time.monotonic() - begun:.0f} s, load average {os.getloadavg()[0]:.1f}"
        print_rows(f"{name}: {title} ({took})", results[name])
        sys.stdout.flush()
    rows = [row for found in results.values() for row in found]
    print_summary(rows)
    if arguments.json is not None:
        write_json(arguments.json, results, facts)
    return int(arguments.strict and any(row.verdict == "MISS" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
