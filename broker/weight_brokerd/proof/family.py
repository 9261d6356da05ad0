"""What the proof asks of a driver's module, and which modules there are."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

FAMILIES = {"npu": "weight_brokerd.proof.npu", "cuda": "weight_brokerd.proof.cuda.family"}
"""By the kind of memory."""


class Row(Protocol):
    """A question, and what the driver's source answers."""

    @property
    def identity(self) -> str:
        """Unique; it is the row's name in reports."""

    @property
    def functions(self) -> tuple[str, ...]:
        """The calls that the row is about."""

    @property
    def done(self) -> str:
        """What is done, and what is looked at, in order."""

    @property
    def expected(self) -> object:
        """What is seen if the source is right."""

    @property
    def source(self) -> str:
        """Where that is from."""

    @property
    def context(self) -> str:
        """Which threads may call."""

    @property
    def owner(self) -> str:
        """Who gives back what, and when."""

    @property
    def since(self) -> str:
        """The driver's oldest version that has it."""

    @property
    def needed_by(self) -> str:
        """What it decides in the product."""


class Family(Protocol):
    """A driver. A module has these names."""

    def rows(self) -> Sequence[Row]:
        """Every row, in the order in which they are run."""

    def run(self, row: Row) -> dict[str, Any]:
        """Runs the row in processes of its own: `verdict` (a name of `Verdict`), `seen`, `calls`."""

    def host(self) -> dict[str, Any]:
        """Facts of the machine, for the report. Raises NotRun if no row can be run."""

    def others(self) -> Mapping[int, str]:
        """The processes that have a card open, with their commands."""


def family(kind: str) -> Family:
    """The module of a kind of memory."""
    return cast(Family, importlib.import_module(FAMILIES[kind]))
