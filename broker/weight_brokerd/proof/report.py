"""What a proof has shown, for people and for a file that is attached to a report."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from weight_brokerd.proof.row import Outcome, Row, S

_HEADS = ("Row", "Functions", "What is done", "Expected", "Threads", "Ownership", "Since", "Source", "Needed by")
SCHEMA = 1


def markdown(rows: Iterable[Row[S]]) -> str:
    """The contract as a table."""
    lines = ["| " + " | ".join(_HEADS) + " |", "|" + "---|" * len(_HEADS)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in _cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def line(outcome: Outcome[S]) -> str:
    """One row, for a terminal."""
    row, said = outcome.row, f"{outcome.row.identity:<14} {outcome.verdict:<18} {outcome.row.done}"
    if not outcome.is_fault and not row.is_open and not outcome.verdict.startswith("not"):
        return said
    return f"{said}\n{'':<14} source: {row.expected!r} ({row.source}); here: {outcome.seen}\n{'':<14} needed by: " + (
        row.needed_by
    )


def content(outcomes: Sequence[Outcome[S]], facts: dict[str, Any]) -> str:
    """The file."""
    rows = [_entry(outcome) for outcome in outcomes]
    return json.dumps({"schema": SCHEMA, "host": {**_host(), **facts}, "rows": rows}, indent=1) + "\n"


def _entry(outcome: Outcome[S]) -> dict[str, Any]:
    row = outcome.row
    return {
        "id": row.identity,
        "question": row.done,
        "calls": row.functions,
        "expected": repr(row.expected),
        "source": row.source,
        "seen": outcome.seen,
        "verdict": outcome.verdict.name.lower(),
        "decides": row.needed_by,
    }


def _host() -> dict[str, Any]:
    return {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "weight_broker": version("weight-broker"),
        "uid": os.geteuid(),
        "groups": sorted(os.getgroups()),
        "namespaces": {name: os.readlink(f"/proc/self/ns/{name}") for name in ("pid", "ipc", "mnt", "net", "user")},
        "is_container": Path("/.dockerenv").exists() or Path("/run/.containerenv").exists(),
    }


def _cells(row: Row[S]) -> tuple[str, ...]:
    names = ", ".join(f"`{name}`" for name in row.functions)
    return (
        row.identity, names, row.done, f"`{row.expected!r}`", row.context, row.owner, row.since, row.source,
        row.needed_by,
    )  # fmt: skip
