"""Events of cards, as callbacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


def _ignore(*_: object) -> None:
    return


def _true() -> bool:
    return True


@dataclass(slots=True)
class Hooks:
    """All are called on the loop."""

    on_offers_lost: Callable[[Sequence[str], str], None] = _ignore
    """(keys, why): the process that offered the keys has ended. Their readers must be ended: they wait for nothing."""
    on_region_lost: Callable[[str, str], None] = _ignore
    """(region, why): a fresh process could not import the region again. It is no source any more."""
    on_worker_found: Callable[[], None] = _ignore
    """The datasystem worker has begun to answer."""
    on_health_change: Callable[[], None] = _ignore
    """`CardSupervisor.health` has changed."""
    worker_serves: Callable[[], bool] = _true
    """Asked: False while it is known that the datasystem worker does not serve, although it listens."""
