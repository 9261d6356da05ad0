"""The health of cards, for people and for health checks."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


class CardState(enum.StrEnum):
    READY = "ready"
    """The card serves, or would start a process now."""
    DEGRADED = "degraded"
    """The last process did not start, or the datasystem worker is away. The broker tries again."""
    FAILED = "failed"
    """The driver did not open the card when the daemon started."""


@dataclass(frozen=True, slots=True)
class CardHealth:
    """One card, for people and for health checks."""

    identity: str
    device_index: int
    soc: str
    state: CardState
    problem: str
    """The driver's or the engine's words; empty if the card is ready."""
    sender_pid: int
    """0: no sender runs."""
    retiring_pids: tuple[int, ...]
    receiver_pids: tuple[int, ...]
    regions: int
    offers: int
    fetches: int


def count_by_state(cards: Iterable[CardHealth]) -> dict[str, int]:
    """Number of cards by state; every state is a key."""
    counted = Counter(card.state for card in cards)
    return {state.value: counted[state] for state in CardState}
