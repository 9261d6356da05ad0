"""What cards tell the daemon, and ask of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass


async def _nobody_asks(region_id: str, bare_tgid: int) -> None:
    """For memory whose exporter does not look at pids."""


def _nobody_listens(*_: object) -> None:
    """For what nobody wants to know."""


@dataclass(slots=True)
class Hooks:
    """All are called on the loop."""

    authorize: Callable[[str, int], Awaitable[None]] = _nobody_asks
    """(region, bare TGID): before a process imports a region. The exporter is to put the process on its whitelist;
    raises CardRefused if it does not."""
    on_offers_lost: Callable[[Sequence[str], str], None] = _nobody_listens
    """(keys, why): the process that offered them has ended. Their readers wait for nothing and are to be ended."""
    on_region_lost: Callable[[str, str], None] = _nobody_listens
    """(region, why): a fresh process could not import it again. It is no source any more."""
    on_health_change: Callable[[], None] = _nobody_listens
    """Something in `CardSupervisor.health` is different."""
