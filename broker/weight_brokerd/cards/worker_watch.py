"""Watches whether the datasystem worker runs, without the engine, which would wait for a minute.

A plain connection stays open: it breaks when the worker ends. The worker may drop an idle connection; it counts as
running while the next connection succeeds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import structlog

log = structlog.get_logger()
_RETRY_SECONDS = 0.25
_CONNECT_SECONDS = 2.0


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
    """Watches one address. `on_change` gets True when the worker begins to answer, False when it ends."""

    def __init__(self, host: str, port: int, on_change: Callable[[bool], None]) -> None:
        self.address = f"{host}:{port}"
        self.is_there = False
        self._host, self._port = host, port
        self._on_change = on_change
        self._task: asyncio.Task[None] | None = None
        self._looked = asyncio.Event()

    async def start(self) -> None:
        """Begin to watch; returns after the first look."""
        self._task = asyncio.create_task(self._watch())
        await self._looked.wait()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_CONNECT_SECONDS):
                    reader, writer = await asyncio.open_connection(self._host, self._port)
            except OSError:  # TimeoutError is one
                self._set(False)
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            self._set(True)
            try:
                while await reader.read(4096):
                    pass
            except OSError:
                pass
            finally:
                writer.close()

    def _set(self, is_there: bool) -> None:
        changed = is_there != self.is_there
        self.is_there = is_there
        self._looked.set()
        if changed:
            log.log(20 if is_there else 40, "datasystem_worker_changed", address=self.address, is_there=is_there)
            self._on_change(is_there)
