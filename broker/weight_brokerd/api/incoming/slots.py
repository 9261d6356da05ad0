"""Who reads a request now, and for how long: half a request occupies a slot."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from weight_broker.errors import InvalidArgument

READ_SECONDS = 10.0
"""For a request to arrive."""
CONTENDED_SECONDS = 2.0
"""The same while others wait for a slot."""


class Slots:
    """For the requests of one user, or of all callers of a service that need no token."""

    def __init__(self, count: int, kept_bytes: int) -> None:
        """No request is read while so many bytes of earlier ones are kept."""
        self._free = asyncio.Semaphore(count)
        self._most_bytes = kept_bytes
        self._kept_bytes = 0
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._waiting = 0
        self._readers: dict[asyncio.Timeout, float] = {}
        """When each began."""

    @asynccontextmanager
    async def slot(self, turn: asyncio.Lock | None = None) -> AsyncIterator[None]:
        """Held while a request is read, and so is `turn`, its sender's. Raises `InvalidArgument` if that takes too
        long."""
        async with self._held(turn or asyncio.Lock()), self._held(self._free):
            await self._has_room.wait()
            try:
                async with self._patience():
                    yield
            except TimeoutError:
                expected = f"a request that arrives within {CONTENDED_SECONDS:g} to {READ_SECONDS:g} s"
                raise InvalidArgument("request", "incomplete", expected) from None

    @asynccontextmanager
    async def _held(self, lock: asyncio.Lock | asyncio.Semaphore) -> AsyncIterator[None]:
        self._waiting += 1
        try:
            if lock.locked():
                self._hurry()
            await lock.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            lock.release()

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
