"""Who reads a request now. A caller that sends half of one holds a slot, so it has less time while others wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from weight_broker.errors import InvalidArgument

READ_SECONDS = 10.0
"""For a request to arrive."""
CONTENDED_SECONDS = 2.0
"""The same while others wait for a slot."""


class Slots:
    """For the requests of one sender."""

    def __init__(self, count: int) -> None:
        self._free = asyncio.Semaphore(count)
        self._waiting = 0
        self._readers: dict[asyncio.Timeout, float] = {}
        """When each began."""

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Held while a request is read. Raises `InvalidArgument` if that takes too long."""
        self._waiting += 1
        try:
            if self._free.locked():
                self._hurry()
            await self._free.acquire()
        finally:
            self._waiting -= 1
        try:
            async with self._patience():
                yield
        except TimeoutError:
            expected = f"a request that arrives within {CONTENDED_SECONDS:g} to {READ_SECONDS:g} s"
            raise InvalidArgument("request", "incomplete", expected) from None
        finally:
            self._free.release()

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
