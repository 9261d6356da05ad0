"""Watches whether the datasystem worker answers, without the engine, which would wait for a minute.

A connection stays open: it breaks when the worker ends. But the kernel accepts and keeps connections of a process that
hangs, so the worker is also asked, again and again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Protocol

import structlog

from weight_brokerd.datasystem.greeting import answers

log = structlog.get_logger()
_RETRY_SECONDS = 0.25
ASK_SECONDS = 1.0
"""Between an answer and the next question."""

_LOOKS = 20
"""Within a retry's time, after a connection has ended: a worker needs longer to start."""


class Worker(Protocol):
    """The datasystem worker, as card processes depend on it."""

    @property
    def address(self) -> str:
        """HOST:PORT."""

    @property
    def is_there(self) -> bool:
        """Whether the worker answers."""


class NoWorker:
    """For cards without a datasystem worker."""

    address = ""
    is_there = True


class WorkerWatch:
    """Watches one address. `on_change` gets True when the worker begins to answer, False when it ends or hangs."""

    def __init__(
        self, host: str, port: int, on_change: Callable[[bool], None], *, serves: Callable[[], bool] = lambda: True
    ) -> None:
        """`serves`: False while it is known that the worker does not serve yet, although it listens."""
        self.address = f"{host}:{port}"
        self._answers = False
        self._host, self._port = host, port
        self._on_change = on_change
        self._serves = serves
        self._task: asyncio.Task[None] | None = None
        self._looked = asyncio.Event()
        self._found = asyncio.Event()

    @property
    def is_there(self) -> bool:
        """Whether the worker answers and serves."""
        return self._answers and self._serves()

    async def start(self) -> None:
        """Begin to watch; returns after the first look."""
        self._task = asyncio.create_task(self._watch())
        await self._looked.wait()

    async def found(self, seconds: float) -> None:
        """Returns when the worker answers, or after so many seconds."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._found.wait(), seconds)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            if not self._serves() or not await answers(self._host, self._port):
                self._set(False)
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            self._set(True)
            await self._until_end_or_next_question()

    async def _until_end_or_next_question(self) -> None:
        """Returns at once when the worker ends: its connections break."""
        try:
            async with asyncio.timeout(ASK_SECONDS):
                reader, writer = await asyncio.open_connection(self._host, self._port)
                try:
                    while await reader.read(4096):
                        pass
                    await self._look_closely()
                finally:
                    writer.close()
        except OSError:  # TimeoutError is one
            pass

    async def _look_closely(self) -> None:
        """The worker has dropped a connection: an idle one, or it has ended, and its successor, which does not know the
        clients of the former, may be there soon."""
        for _ in range(_LOOKS):
            try:
                _, writer = await asyncio.open_connection(self._host, self._port)
            except OSError:
                self._set(False)
                return
            writer.close()
            await asyncio.sleep(_RETRY_SECONDS / _LOOKS)

    def _set(self, is_there: bool) -> None:
        changed = is_there != self._answers
        self._answers = is_there
        self._looked.set()
        if is_there:
            self._found.set()
        else:
            self._found.clear()
        if changed:
            log.log(20 if is_there else 40, "datasystem_worker_changed", address=self.address, is_there=is_there)
            self._on_change(is_there)
