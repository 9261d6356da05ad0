"""All rows, as a table for people, and what a run of them says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from weight_brokerd.ascend_check.contract import chunks, devices, keys, links, peers, streams, symbols
from weight_brokerd.ascend_check.contract.row import Outcome, Row, run

ROWS: tuple[Row, ...] = (
    *devices.ROWS,
    *symbols.ROWS,
    *keys.ROWS,
    *chunks.ROWS,
    *peers.ROWS,
    *streams.ROWS,
    *links.ROWS,
)
"""Those without communicators first: HCCL keeps its ports for as long as a process lives."""

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


def markdown() -> str:
    """The table in Markdown."""
    lines = ["| " + " | ".join(_HEADS) + " |", "|" + "---|" * len(_HEADS)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in _cells(row)) + " |" for row in ROWS]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    names = ", ".join(f"`{name}`" for name in row.functions[:_SHOWN_FUNCTIONS])
    if len(row.functions) > _SHOWN_FUNCTIONS:
        names += f" and {len(row.functions) - _SHOWN_FUNCTIONS} more"
    expected = f"`{row.expected!r}`"
    return row.identity, names, row.done, expected, row.context, row.owner, row.since, row.source, row.needed_by


def covered() -> frozenset[str]:
    """The functions that have a row."""
    return frozenset(name for row in ROWS for name in row.functions)


def outcomes(environment: Mapping[str, str] | None = None) -> Iterator[Outcome]:
    """Runs every row, one after the other."""
    for row in ROWS:
        yield run(row, environment)
