"""The proof for people, and for programs."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from weight_brokerd.proof.family import Row
from weight_brokerd.proof.runner import Result, Verdict

SCHEMA = 1
SHOWN = {
    Verdict.AS_SOURCE: "as the source",
    Verdict.UNLIKE_SOURCE: "UNLIKE the source",
    Verdict.RECORDED: "recorded",
    Verdict.NOT_RUN: "not run",
}
_HEADS = (
    "Row",
    "Function",
    "What is done, what is looked at",
    "Expected",
    "Threads",
    "Ownership",
    "Since",
    "Source",
    "Needed by",
)
_SHOWN_FUNCTIONS = 6
_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user")
_INDENT = " " * 34


def lines(result: Result) -> list[str]:
    """A row of the table."""
    row = result.row
    first = f"{row.identity:<15} {SHOWN[result.verdict]:<17} {row.done}"
    seen = f"{_INDENT}source: {row.expected!r}; here: {result.seen}"
    if result.verdict in (Verdict.AS_SOURCE, Verdict.NOT_RUN):
        return [first, f"{_INDENT}{result.seen}" if result.verdict is Verdict.NOT_RUN else seen]
    return [first, seen, f"{_INDENT}decides: {row.needed_by}"]


def summary(results: Iterable[Result]) -> str:
    """How many rows there are of each verdict."""
    counts = Counter(result.verdict for result in results)
    return ", ".join(f"{counts[verdict]} {SHOWN[verdict]}" for verdict in Verdict)


def document(host: dict[str, Any], results: Sequence[Result]) -> dict[str, Any]:
    """The content of proof.json."""
    return {"schema": SCHEMA, "host": _host() | host, "rows": [_row(result) for result in results]}


def _host() -> dict[str, Any]:
    return {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "weight_broker": version("weight-broker"),
        "uid": os.geteuid(),
        "groups": sorted(os.getgroups()),
        "namespaces": {name: os.readlink(f"/proc/self/ns/{name}") for name in _NAMESPACES},
        "is_container": Path("/.dockerenv").exists() or Path("/run/.containerenv").exists(),
    }


def _row(result: Result) -> dict[str, Any]:
    row = result.row
    return {
        "id": row.identity,
        "question": row.done,
        "functions": list(row.functions),
        "calls": result.calls,
        "expected": repr(row.expected),
        "source": row.source,
        "seen": {"value": result.seen, "seconds": result.seconds},
        "verdict": result.verdict,
        "decides": row.needed_by,
    }


def markdown(rows: Iterable[Row]) -> str:
    """The contract as a table."""
    lines = ["| " + " | ".join(_HEADS) + " |", "|" + "---|" * len(_HEADS)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in _cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    names = ", ".join(f"`{name}`" for name in row.functions[:_SHOWN_FUNCTIONS])
    if len(row.functions) > _SHOWN_FUNCTIONS:
        names += f" and {len(row.functions) - _SHOWN_FUNCTIONS} more"
    expected = f"`{row.expected!r}`"
    return row.identity, names, row.done, expected, row.context, row.owner, row.since, row.source, row.needed_by
