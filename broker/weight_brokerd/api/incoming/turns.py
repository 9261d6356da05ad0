"""Long work on the event loop, one step for each turn of the loop: no call waits longer than for one step.

However many requests and answers are large, one step of one of them runs at a time, in the order in which they asked.
"""

from __future__ import annotations

import asyncio

from weight_brokerd.kinds.steps import Steps, T


class Turns:
    """One for a server."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()  # it is fair: who waits gets it before who had it last

    async def take(self, steps: Steps[T]) -> T:
        """The result of the work."""
        while True:
            async with self._turn:
                try:
                    next(steps)
                except StopIteration as end:
                    result: T = end.value
                    return result
                await asyncio.sleep(0)
