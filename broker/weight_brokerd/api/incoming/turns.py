"""Long work on the event loop, one step for each turn of the loop: no call waits longer than for one step.

However many requests are large, one step of one of them runs at a time, in the order in which they asked.
"""

from __future__ import annotations

import asyncio
import gc

from weight_brokerd.kinds.steps import Steps, T

_WORKS_PER_COLLECTION = 16


class Turns:
    """One for a server."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()  # it is fair: who waits gets it before who had it last

    async def take(self, steps: Steps[T]) -> T:
        """The result of the work."""
        with _collector:
            while True:
                async with self._turn:
                    try:
                        next(steps)
                    except StopIteration as end:
                        result: T = end.value
                        return result
                    await asyncio.sleep(0)


class _Collector:
    """Python's garbage collector looks at every tensor of every large layout again and again, 0.1 s each time, although
    they are in no cycle. While there is large work it does not run, and what is there afterwards it leaves out. Now and
    then it looks at everything, because some of that may be garbage."""

    def __init__(self) -> None:
        self._running = 0
        self._ended = 0

    def __enter__(self) -> None:
        if not self._running:
            gc.collect(1)
            gc.disable()
        self._running += 1

    def __exit__(self, *_: object) -> None:
        self._running -= 1
        self._ended += 1
        if self._ended % _WORKS_PER_COLLECTION == 0:
            gc.unfreeze()
            gc.collect()
        gc.freeze()
        if not self._running:
            gc.enable()


_collector = _Collector()
