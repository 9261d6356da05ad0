"""Rows of measurements, printed as tables and as a summary of measured / budget."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Budget:
    """A value that must not be above (or, with `at_least`, below) a limit."""

    value: float
    limit: float
    unit: str
    at_least: bool = False

    @property
    def met(self) -> bool:
        """True if the value keeps to the limit."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{number(self.value)} / {sign} {number(self.limit)} {self.unit}"


@dataclass(frozen=True, slots=True)
class Row:
    """One answer."""

    what: str
    measured: str
    baseline: str = ""
    """What the same run measured to compare with."""
    ratio: str = ""
    """Measured against baseline."""
    budget: Budget | None = None
    """None for a row that is there to be known."""
    conditions: str = ""
    """State of the page cache, whether destination memory was touched before, sizes."""

    @property
    def verdict(self) -> str:
        """PASS, MISS or nothing."""
        if self.budget is None:
            return ""
        return "PASS" if self.budget.met else "MISS"


def number(value: float) -> str:
    """Three digits that mean something."""
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def milliseconds(seconds: float) -> str:
    """A duration as text."""
    return f"{number(seconds)} s" if seconds >= 1 else f"{number(seconds * 1e3)} ms"


def size(size_bytes: float) -> str:
    """Bytes as text."""
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"


def print_rows(title: str, rows: Iterable[Row]) -> None:
    """The table of one benchmark, with everything that is known about each row."""
    print(f"\n{title}")
    cells = [
        (row.what, row.measured, row.baseline, row.ratio, str(row.budget or ""), row.verdict, row.conditions)
        for row in rows
    ]
    _print_table(("what", "measured", "baseline", "ratio", "measured / budget", "", "conditions"), cells)


def print_summary(rows: Iterable[Row]) -> None:
    """Every budget: measured / budget and whether it was met."""
    print("\nmeasured / budget")
    cells = [(row.what, str(row.budget), row.verdict) for row in rows if row.budget is not None]
    _print_table(("what", "measured / budget", ""), cells)


def write_json(path: Path, results: dict[str, list[Row]], facts: dict[str, object]) -> None:
    """Everything, for machines."""
    benchmarks = {name: [{**asdict(row), "verdict": row.verdict} for row in rows] for name, rows in results.items()}
    path.write_text(json.dumps({"machine": facts, "benchmarks": benchmarks}, indent=2) + "\n")


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for index, row in enumerate([header, *rows]):
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if index == 0:
            print("  " + "  ".join("-" * width for width in widths))
