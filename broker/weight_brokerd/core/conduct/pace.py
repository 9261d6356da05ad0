"""How fast a process may ask: a steady rate, with a burst before it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pace:
    """A rate."""

    per_second: float
    burst: float
    """As many at once after a pause."""


class Paces:
    """The balance of everyone who asks, at one pace. What is full again is forgotten."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._balances: dict[Hashable, tuple[float, float]] = {}
        """Balance and when it was so."""

    def __len__(self) -> int:
        return len(self._balances)

    def wait(self, asker: Hashable, now: float) -> float:
        """Seconds until the asker may ask again; 0 if it may now."""
        return max(0.0, (1.0 - self._balance(asker, now)) / self._pace.per_second)

    def spend(self, asker: Hashable, now: float, count: float = 1.0) -> None:
        """The asker has asked, or has done what costs as much as asking `count` times."""
        self._balances[asker] = (self._balance(asker, now) - count, now)

    def tidy(self, now: float) -> None:
        """Forget who could ask a whole burst now."""
        full = [asker for asker in self._balances if self._balance(asker, now) >= self._pace.burst]
        for asker in full:
            del self._balances[asker]

    def _balance(self, asker: Hashable, now: float) -> float:
        balance, then = self._balances.get(asker, (self._pace.burst, now))
        return min(self._pace.burst, balance + (now - then) * self._pace.per_second)
