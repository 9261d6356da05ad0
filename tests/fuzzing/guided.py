"""The parsers, fed by atheris, which looks for inputs that reach new code: python -m fuzzing.guided PARSER [ARGUMENTS].

The arguments are libFuzzer's, for example -max_total_time=60. Needs the dependency group `fuzzing`.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONGEST_SAMPLE_BYTES = 4096


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(f"usage: python -m fuzzing.guided PARSER [libFuzzer's arguments]\nparsers: {', '.join(_parsers())}")
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["weight_broker", "weight_brokerd"]):
        parsers = _parsers()
    name = sys.argv[1]
    if name not in parsers:
        sys.exit(f"no parser {name!r}; there are: {', '.join(parsers)}")
    with tempfile.TemporaryDirectory(prefix="corpus-") as corpus:
        for number, sample in enumerate([*parsers[name].samples, *_documents(parsers[name])]):
            (Path(corpus) / str(number)).write_bytes(sample)
        atheris.Setup([sys.argv[0], *sys.argv[2:], corpus], _target(parsers[name]))
        atheris.Fuzz()


def _parsers() -> dict[str, Any]:
    return dict(importlib.import_module("fuzzing.parsers").PARSERS)


def _documents(parser: Any) -> list[bytes]:
    documents: list[bytes] = importlib.import_module("fuzzing.hostile").documents(parser)
    return [document for document in documents if len(document) < LONGEST_SAMPLE_BYTES]


def _target(parser: Any) -> Callable[[bytes], None]:
    feed = importlib.import_module("fuzzing.parsers").feed
    return lambda data: feed(parser, data)


if __name__ == "__main__":
    main()
