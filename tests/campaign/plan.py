"""The decisions of a campaign: which operation comes next at a seat, and what goes wrong meanwhile. All of them follow
from the seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from campaign.weights import MODELS

OPERATIONS: Mapping[str, int] = {
    "publish": 12,
    "acquire": 28,
    "acquire_or_load": 22,
    "lease": 14,
    "settle": 14,
    "attach": 14,
    "retract": 8,
    "close": 4,
    "die": 2,
}
"""What an instance does, and how often."""
SETTLEMENTS = ("publish", "give up", "extend", "forget")
"""What becomes of a cold-load lease."""

INSTANCE_FAULTS: Mapping[str, int] = {
    "kill": 40,
    "stop": 15,
    "hang up attach": 12,
    "hang up grpc": 12,
    "memory shortage": 8,
}
BROKER_FAULTS: Mapping[str, int] = {
    "broker kill": 4,
    "broker terminate": 2,
    "broker stop": 5,
    "broker disk full": 3,
    "broker descriptor shortage": 3,
}
_SHORT, _LONG = 0.3, 20.0


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong during an operation."""

    kind: str
    after: float
    """Seconds after the beginning of the operation."""
    seconds: float
    """How long it lasts, where it does not end by itself."""


@dataclass(frozen=True)
class Step:
    """One operation of one seat."""

    number: int
    operation: str
    model: str
    timeout: float
    settlement: str = ""
    pause: float = 0.0
    """Seconds that a load from disk takes."""
    fault: Fault | None = None


def steps(
    seed: int, seat: int, *, operations: Mapping[str, int] = OPERATIONS, fault_rate: float = 0.12
) -> Iterator[Step]:
    """The steps of a seat, without end."""
    chance = random.Random(f"{seed}/{seat}")
    number = 0
    while True:
        number += 1
        yield Step(
            number,
            _weighted(chance, operations),
            chance.choice(list(MODELS)),
            timeout=_SHORT if chance.random() < 0.2 else _LONG,
            settlement=chance.choice(SETTLEMENTS),
            pause=chance.choice((0.0, 0.0, 0.05, 0.3)),
            fault=_fault(chance) if chance.random() < fault_rate else None,
        )


def _fault(chance: random.Random) -> Fault:
    kind = _weighted(chance, {**INSTANCE_FAULTS, **BROKER_FAULTS})
    return Fault(kind, after=chance.choice((0.0, 0.003, 0.01, 0.03, 0.1)), seconds=chance.choice((0.1, 0.5, 1.5)))


def _weighted(chance: random.Random, weights: Mapping[str, int]) -> str:
    return chance.choices(list(weights), list(weights.values()))[0]
