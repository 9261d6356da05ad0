"""Timing: arms that take turns, so that whatever else the machine does hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.report import milliseconds

Arm = Callable[[], float | None]
"""Does something once. Returns the seconds that it took, or None to have the whole call timed."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Seconds, in the order of the rounds."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """p50."""
        return statistics.median(self.values)

    def quantile(self, share: float) -> float:
        """The value that this share of the samples does not exceed."""
        ordered = sorted(self.values)
        return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]

    def ratio_to(self, other: Samples) -> float:
        """Median over the rounds of this arm's time divided by the other's in the same round."""
        return statistics.median(mine / theirs for mine, theirs in zip(self.values, other.values, strict=True))

    def less(self, other: Samples) -> float:
        """Median over the rounds of this arm's time minus the other's in the same round."""
        return statistics.median(mine - theirs for mine, theirs in zip(self.values, other.values, strict=True))

    def __str__(self) -> str:
        low, high = milliseconds(self.quantile(0.1)), milliseconds(self.quantile(0.9))
        return f"{milliseconds(self.median)} [{low} .. {high}]"


def interleaved(arms: Mapping[str, Arm], *, rounds: int, warm_up: int = 1) -> dict[str, Samples]:
    """Runs every arm once per round, from the other end every second round. Warm-up rounds are thrown away."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(-warm_up, rounds):
        names = list(arms) if number % 2 else list(arms)[::-1]
        for name in names:
            begun = time.perf_counter()
            reported = arms[name]()
            seconds = time.perf_counter() - begun
            if number >= 0:
                found[name].append(seconds if reported is None else reported)
    return {name: Samples(tuple(values)) for name, values in found.items()}
