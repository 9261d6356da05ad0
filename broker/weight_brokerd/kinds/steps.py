"""Work in steps of some milliseconds: between two of them other calls get their turn (`api.incoming.turns`)."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
"""Yields where others may go on; returns the result."""

PER_STEP = 128
"""Tensors, placements or fields of one step."""


def at_once(steps: Steps[T]) -> T:
    """All steps in a row, where the work is small."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result
