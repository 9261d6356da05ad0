"""Work that must not be interrupted, and work without a waiter."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine
from typing import Any, TypeVar

import structlog

log = structlog.get_logger()
T = TypeVar("T")


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Awaits `work` to its end, also if the caller is cancelled; the cancellation is raised afterwards."""
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.cancelled():
                raise
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return task.result()


async def together(*works: Coroutine[Any, Any, object]) -> None:
    """Runs all at the same time. After a failure or a cancellation of the caller the others are cancelled; the error is
    raised when all have ended."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await uninterrupted(_ended(tasks))
    for task in tasks:
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error


async def _ended(tasks: Collection[asyncio.Task[Any]]) -> None:
    await asyncio.wait(tasks)


class Background:
    """Tasks without a waiter; their errors are logged."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[object]] = set()

    def spawn(self, work: Coroutine[Any, Any, object]) -> asyncio.Task[object]:

        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    async def close(self) -> None:
        """Wait until all tasks have ended."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    def _finished(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background_work_failed", exc_info=error)
