"""Tensors that lie over each other in packed memory: each has its bytes for itself, so such places are wrong."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from weight_broker.errors import InvalidArgument
from weight_brokerd.kinds.steps import PER_STEP, Steps

Span = tuple[int, int, int]
"""Region, offset, length."""
_SORTED_AT_ONCE = 16 * PER_STEP


def refuse_overlaps(spans: Sequence[Span]) -> Steps[None]:
    """Raises `InvalidArgument` if two spans share a byte."""
    runs: list[list[Span]] = []
    for start in range(0, len(spans), _SORTED_AT_ONCE):
        runs.append(sorted(spans[start : start + _SORTED_AT_ONCE]))
        yield
    region, end = 0, 0
    for number, span in enumerate(heapq.merge(*runs), 1):
        if span[0] == region and span[1] < end:
            raise InvalidArgument(
                "placements",
                f"{span[0]}:{span[1]}, {span[2]} bytes",
                f"places that do not overlap: the tensor before it ends at {end}",
            )
        region, end = span[0], span[1] + span[2]
        if number % (4 * PER_STEP) == 0:
            yield
