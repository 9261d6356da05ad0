"""Who reads a request now. A caller that sends half of one holds a slot, so it has less time while others wait.

gRPC needs several times the size of a request while it arrives, so a user has few slots. A process gets a second one
only while half of its user's are free: one that holds all it can get keeps no other process from reading.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from weight_broker.errors import InvalidArgument
from weight_brokerd.core.model import Process

READ_SECONDS = 10.0
"""For a request to arrive."""
CONTENDED_SECONDS = 2.0
"""The same while others wait for a slot."""
SLOTS_OF_USER = 4
SLOTS_OF_PROCESS = 2


class Slots:
    """For the requests of one user. Its processes take turns."""

    def __init__(self) -> None:
        self._held = Counter[Process]()
        self._waiting: dict[Process, deque[asyncio.Future[None]]] = {}
        self._readers: dict[asyncio.Timeout, float] = {}
        """When each began."""

    @asynccontextmanager
    async def slot(self, process: Process) -> AsyncIterator[None]:
        """Held while a request is read. Raises `InvalidArgument` if that takes too long."""
        await self._take(process)
        try:
            async with self._patience():
                yield
        except TimeoutError:
            expected = f"a request that arrives within {CONTENDED_SECONDS:g} to {READ_SECONDS:g} s"
            raise InvalidArgument("request", "incomplete", expected) from None
        finally:
            self._release(process)

    async def _take(self, process: Process) -> None:
        if process not in self._waiting and self._has_one_for(process):
            self._held[process] += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(process, deque()).append(turn)
        self._hurry()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._release(process)
            raise

    def _has_one_for(self, process: Process) -> bool:
        held, all_held = self._held[process], self._held.total()
        if not held:
            return all_held < SLOTS_OF_USER
        return held < SLOTS_OF_PROCESS and all_held < SLOTS_OF_USER // 2

    def _release(self, process: Process) -> None:
        self._held[process] -= 1
        if not self._held[process]:
            del self._held[process]
        for waiting in list(self._waiting):
            if self._has_one_for(waiting):
                self._give_next(waiting)

    def _give_next(self, process: Process) -> None:
        """The next call of the process, if one still waits, has a slot; then it is the turn of the other processes."""
        turns = self._waiting.pop(process)
        while turns and turns[0].done():
            turns.popleft()
        if turns:
            self._held[process] += 1
            turns.popleft().set_result(None)
        if turns:
            self._waiting[process] = turns

    @asynccontextmanager
    async def _patience(self) -> AsyncIterator[None]:
        async with asyncio.timeout(CONTENDED_SECONDS if self._waiting else READ_SECONDS) as timeout:
            self._readers[timeout] = asyncio.get_running_loop().time()
            try:
                yield
            finally:
                del self._readers[timeout]

    def _hurry(self) -> None:
        now = asyncio.get_running_loop().time()
        for timeout, begun in self._readers.items():
            when = timeout.when()
            if when is not None:
                timeout.reschedule(min(when, max(begun + CONTENDED_SECONDS, now)))
