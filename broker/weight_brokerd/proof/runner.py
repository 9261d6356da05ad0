"""Runs rows one after the other, each in a group of processes of its own that is killed when its time is over.

A fault on a card takes a process along, and a driver may hang: neither reaches the next row.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from weight_brokerd.proof.family import Row

ROW_SECONDS = 60.0
_WORDS = 300


class Verdict(enum.StrEnum):
    """What a row shows; the values stand in proof.json."""

    AS_SOURCE = "as_source"
    UNLIKE_SOURCE = "unlike_source"
    RECORDED = "recorded"
    """The source does not say."""
    NOT_RUN = "not_run"


@dataclass(frozen=True, slots=True)
class Result:
    """A row that was run."""

    row: Row
    verdict: Verdict
    seen: str
    calls: list[dict[str, Any]]
    seconds: float


def results(kind: str, rows: Sequence[Row], seconds: float = ROW_SECONDS) -> Iterator[Result]:
    """Runs the rows in their order."""
    for row in rows:
        began = time.monotonic()
        outcome = _outcome([sys.executable, "-m", "weight_brokerd.proof.single", kind, row.identity], seconds)
        spent = round(time.monotonic() - began, 3)
        yield Result(row, Verdict(outcome["verdict"]), outcome["seen"], outcome["calls"], spent)


def _outcome(command: Sequence[str], seconds: float) -> dict[str, Any]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return _not_run(f"killed: the row did not end within {seconds:g} s")
    finally:
        _kill_group(process)
    try:
        found: dict[str, Any] = json.loads(output)
    except ValueError:
        words = errors.strip().splitlines() or ["without a word"]
        return _not_run(f"the row's process ended with {process.returncode}: {words[-1][:_WORDS]}")
    return found


def _not_run(words: str) -> dict[str, Any]:
    return {"verdict": Verdict.NOT_RUN, "seen": words, "calls": []}


def _kill_group(process: subprocess.Popen[str]) -> None:
    """The children of a row that was killed are in its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
