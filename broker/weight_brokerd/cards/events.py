"""Events of cards, as callbacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


def _ignore(*_: object) -> None:
    return


@dataclass(slots=True)
class Hooks:
    """All are called on the loop."""

    on_offers_lost: Callable[[Sequence[str], str], None] = _ignore
    """(keys, why): the process that offered the keys has ended. Their readers must be ended: they wait for nothing."""
    on_region_lost: Callable[[str, str], None] = _ignore
    """(region, why): a fresh process could not import the region again. It is no source any more."""
    on_health_change: Callable[[], None] = _ignore
    """`CardSupervisor.health` has changed."""
