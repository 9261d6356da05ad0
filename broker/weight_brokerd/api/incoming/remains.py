"""Large layouts that are gone, freed in steps: the 2,000,000 tensors of a process that died take 0.3 s at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from weakref import finalize

from weight_broker.layout import Layout, TensorSpec
from weight_brokerd.api.incoming.turns import Turns
from weight_brokerd.kinds.steps import PER_STEP, Steps

FREED_AT_ONCE = 4 * PER_STEP
"""Layouts with so many tensors are not followed."""


class Remains:
    """One for a server."""

    def __init__(self, turns: Turns, spawn: Callable[[Coroutine[None, None, None]], None]) -> None:
        """`spawn` runs work in the background."""
        self._turns = turns
        self._spawn = spawn
        self._loop = asyncio.get_running_loop()

    def follow(self, layout: Layout) -> None:
        """Once nothing has the layout any more, free its tensors in steps."""
        if len(layout) > FREED_AT_ONCE:
            finalize(layout, self._gone, layout.tensors).atexit = False

    def _gone(self, tensors: tuple[TensorSpec, ...]) -> None:
        """In any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._free, tensors)

    def _free(self, tensors: tuple[TensorSpec, ...]) -> None:
        self._spawn(self._turns.take(_freed(list(tensors))))


def _freed(tensors: list[TensorSpec]) -> Steps[None]:
    while tensors:
        del tensors[-FREED_AT_ONCE:]
        yield
