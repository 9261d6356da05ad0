"""What the desks of the control plane share: the core, the executor, a clock, and background tasks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine

import structlog

from weight_brokerd.control.executor import Executor
from weight_brokerd.core.coordinator import Coordinator
from weight_brokerd.core.decisions import Decisions

log = structlog.get_logger()


class Loop:
    """One for the whole control plane. Everything runs on one event loop: an event and its decisions are one step."""

    def __init__(self, coordinator: Coordinator, executor: Executor) -> None:
        self.coordinator = coordinator
        self.now = time.monotonic
        self._executor = executor
        self._tasks: set[asyncio.Task[None]] = set()

    def carry_out(self, decisions: Decisions) -> None:
        """Hand decisions to the executor."""
        self._executor.carry_out(decisions)

    def author(self, instance_id: str) -> dict[str, object]:
        """Who an instance is, as the kernel attested it, for the audit."""
        instance = self.coordinator.instances.get(instance_id)
        if instance is None:
            return {"instance_id": instance_id}
        return {"instance_id": instance_id, "pid": instance.pid, "uid": instance.uid, "gid": instance.gid}

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        """Run work without a waiter; its error is logged."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def close(self) -> None:
        """Cancel the background tasks."""
        for task in self._tasks:
            task.cancel()

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("internal_error", exc_info=error)
