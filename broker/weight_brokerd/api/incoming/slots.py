"""Who reads a request now. A caller that sends half of one holds a slot, so it has less time while others wait.

gRPC needs several times the size of a request while it arrives, so a user has few slots, and each process one: a
process that sends half a request keeps no other one from reading.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from weight_broker.errors import InvalidArgument
from weight_brokerd.core.model import Process

READ_SECONDS = 10.0
"""For a request to arrive."""
CONTENDED_SECONDS = 2.0
"""The same while others wait for a slot."""
SLOTS_OF_USER = 4


class Slots:
    """For the requests of one user. Its processes take turns."""

    def __init__(self, kept_bytes: int) -> None:
        """No request is read while so many bytes of earlier ones are kept."""
        self._most_bytes = kept_bytes
        self._kept_bytes = 0
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._reading: set[Process] = set()
        self._waiting: dict[Process, deque[asyncio.Future[None]]] = {}
        self._readers: dict[asyncio.Timeout, float] = {}
        """When each began."""

    @asynccontextmanager
    async def slot(self, process: Process) -> AsyncIterator[None]:
        """Held while a request is read. Raises `InvalidArgument` if that takes too long."""
        await self._take(process)
        try:
            await self._has_room.wait()
            async with self._patience():
                yield
        except TimeoutError:
            expected = f"a request that arrives within {CONTENDED_SECONDS:g} to {READ_SECONDS:g} s"
            raise InvalidArgument("request", "incomplete", expected) from None
        finally:
            self._release(process)

    @contextmanager
    def keeping(self, size_bytes: int) -> Iterator[None]:
        """A request of this size stays in memory for the length of a block."""
        self._keep(size_bytes)
        try:
            yield
        finally:
            self._keep(-size_bytes)

    def _keep(self, size_bytes: int) -> None:
        self._kept_bytes += size_bytes
        if self._kept_bytes < self._most_bytes:
            self._has_room.set()
        else:
            self._has_room.clear()

    async def _take(self, process: Process) -> None:
        if process not in self._waiting and self._has_one_for(process):
            self._reading.add(process)
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
        return process not in self._reading and len(self._reading) < SLOTS_OF_USER

    def _release(self, process: Process) -> None:
        self._reading.discard(process)
        if process in self._waiting:  # those that have read nothing come first
            self._waiting[process] = self._waiting.pop(process)
        for waiting in list(self._waiting):
            if self._has_one_for(waiting):
                self._give_next(waiting)

    def _give_next(self, process: Process) -> None:
        """The next call of the process, if one still waits, has a slot; then it is the turn of the other processes."""
        turns = self._waiting.pop(process)
        while turns and turns[0].done():
            turns.popleft()
        if turns:
            self._reading.add(process)
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
