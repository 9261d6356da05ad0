"""Draining: no new work; running transfers end, or are cut off."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from weight_brokerd.control.loop import Loop
from weight_brokerd.telemetry.audit import audit


class Draining:
    """The end of the broker's service, by an administrator or because the broker stops."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._idle = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []

    def on_begin(self, listener: Callable[[], None]) -> None:
        """`listener` is called when a drain begins."""
        self._listeners.append(listener)

    def begin(self, instance_id: str = "") -> None:
        """Refuse new work from now on; `instance_id` is the administrator's, empty if the broker stops."""
        if self._loop.coordinator.draining:
            return
        audit("drain", **self._loop.author(instance_id))
        self._loop.carry_out(self._loop.coordinator.drain(self._loop.now()))
        for listener in self._listeners:
            listener()

    async def drain(self, timeout_seconds: float, instance_id: str = "") -> bool:
        """Refuse new work and wait for running transfers; False if some still run after the timeout."""
        self.begin(instance_id)
        try:
            async with asyncio.timeout(timeout_seconds):
                while self._loop.coordinator.transfers.running:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def cut_off(self) -> None:
        """End the transfers that still run, so that their calls end with an answer."""
        audit("cut_off", running_transfers=len(self._loop.coordinator.transfers.running))
        self._loop.carry_out(self._loop.coordinator.cut_off(self._loop.now()))

    def settled(self) -> None:
        if not self._loop.coordinator.transfers.running:
            self._idle.set()
