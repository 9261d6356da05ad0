"""Lets calls in one by one, in the order of `Turns`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from weight_brokerd.core.conduct.turns import Turns
from weight_brokerd.core.model import Process

MOST_WAITING = 256
"""Calls of one process that wait. Each takes memory and time before its turn; further ones stay in the socket."""
_OVERRUN_SECONDS = 0.05
AT_ONCE = 4
"""Calls that begin in one turn of the event loop. What becomes ready meanwhile has its turn after so many."""


class Gate:
    """One for all calls of the broker."""

    def __init__(self, turns: Turns[asyncio.Future[None]], clock: Callable[[], float]) -> None:
        self._turns = turns
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._begun = 0
        """Calls that have begun in this turn of the loop."""
        self._next: asyncio.Handle | None = None
        self._due = 0.0
        """When `_next` is called."""

    async def enter(self, process: Process) -> None:
        """Return when it is the turn of this call."""
        if self._begun < AT_ONCE and self._turns.pass_at_once(process, self._clock()):
            self._count()
            return
        turn: asyncio.Future[None] = self._loop.create_future()
        self._turns.add(process, turn)
        self._plan(self._turns.seconds_until(process, self._clock()))
        try:
            await turn
        except asyncio.CancelledError:
            self._turns.remove(process, turn, self._clock())
            raise

    def overrun(self, process: Process) -> float:
        """Seconds for which the broker reads nothing of the process, as enough of its calls wait; else 0."""
        if self._turns.waiting_of(process) > MOST_WAITING:
            return _OVERRUN_SECONDS
        seconds = self._turns.seconds_until(process, self._clock())
        return seconds if seconds > _OVERRUN_SECONDS else 0.0

    def charge_refusal(self, process: Process) -> None:
        """A call of the process was refused: its next ones wait longer."""
        self._turns.charge_refusal(process, self._clock())

    def _count(self) -> None:
        if not self._begun:
            self._loop.call_soon(self._new_turn)
        self._begun += 1

    def _new_turn(self) -> None:
        self._begun = 0

    def _plan(self, seconds: float) -> None:
        """Let calls in after so many seconds, or earlier if that is planned."""
        due = self._clock() + seconds
        if self._next is not None:
            if due >= self._due:
                return
            self._next.cancel()
        self._due = due
        soon = seconds <= 0
        self._next = self._loop.call_soon(self._let_in) if soon else self._loop.call_later(seconds, self._let_in)

    def _let_in(self) -> None:
        self._next = None
        for _ in range(AT_ONCE):
            turn = self._turns.next(self._clock())
            if turn is None:
                seconds = self._turns.seconds_until_next(self._clock())
                if seconds is not None:
                    self._plan(seconds)
                return
            if not turn.done():
                turn.set_result(None)
        self._plan(0)
