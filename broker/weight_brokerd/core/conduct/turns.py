"""Whose call is next: users take turns, and the processes of a user take turns, each at its own pace.

A process that asks faster than its pace waits; its calls are not refused, since a refusal would only make it ask again.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

from weight_brokerd.core.conduct.pace import Pace, Paces
from weight_brokerd.core.model import Process

REFUSAL_COST = 10.0
"""In calls."""
_TIDY_AFTER = 1024

Item = TypeVar("Item")


class Turns(Generic[Item]):
    """The calls that wait."""

    def __init__(self, *, process: Pace, user: Pace) -> None:
        self._of_process = Paces(process)
        self._of_user = Paces(user)
        self._users: dict[int, dict[Process, deque[Item]]] = {}
        """Users and their processes that wait, each in the order of their next turns."""
        self._waiting = 0
        self._tidy_above = _TIDY_AFTER

    def __len__(self) -> int:
        return self._waiting

    def pass_at_once(self, process: Process, now: float) -> bool:
        """Whether a new call has its turn now because no other waits."""
        if self._waiting or self._of_process.wait(process, now) or self._of_user.wait(process.uid, now):
            return False
        self._spend(process, now)
        return True

    def add(self, process: Process, item: Item) -> None:
        """A call waits."""
        queue = self._users.setdefault(process.uid, {}).setdefault(process, deque())
        queue.append(item)
        self._waiting += 1

    def charge_refusal(self, process: Process, now: float) -> None:
        """A call was refused. It has cost as much as others, and a process that asks again at once asks in vain."""
        self._of_process.spend(process, now, REFUSAL_COST)

    def remove(self, process: Process, item: Item, now: float) -> None:
        """The call ended while it waited, which costs its process alone as much as a turn. Nothing happens if it does
        not wait."""
        queue = self._users.get(process.uid, {}).get(process)
        if queue is not None and item in queue:
            queue.remove(item)
            self._waiting -= 1
            self._drop_empty(process)
            self._of_process.spend(process, now)

    def waiting_of(self, process: Process) -> int:
        """How many calls of the process wait."""
        return len(self._users.get(process.uid, {}).get(process, ()))

    def next(self, now: float) -> Item | None:
        """The call whose turn it is; it does not wait any more. None if no process may ask now."""
        for process in self._ready(now):
            item = self._users[process.uid][process].popleft()
            self._waiting -= 1
            self._spend(process, now)
            self._to_the_end(process)
            return item
        return None

    def seconds_until(self, process: Process, now: float) -> float:
        """When the process may ask again."""
        return max(self._of_user.wait(process.uid, now), self._of_process.wait(process, now))

    def seconds_until_next(self, now: float) -> float | None:
        """When `next` has a call; None if none waits."""
        waiting = (process for processes in self._users.values() for process in processes)
        return min((self.seconds_until(process, now) for process in waiting), default=None)

    def _ready(self, now: float) -> list[Process]:
        """The process whose turn it is, as a list of at most one."""
        for uid, processes in self._users.items():
            if self._of_user.wait(uid, now) > 0:
                continue
            for process in processes:
                if self._of_process.wait(process, now) <= 0:
                    return [process]
        return []

    def _to_the_end(self, process: Process) -> None:
        """The process, and its user, have had their turn."""
        processes = self._users.pop(process.uid)
        processes[process] = processes.pop(process)
        self._users[process.uid] = processes
        self._drop_empty(process)

    def _drop_empty(self, process: Process) -> None:
        processes = self._users[process.uid]
        if not processes[process]:
            del processes[process]
        if not processes:
            del self._users[process.uid]

    def _spend(self, process: Process, now: float) -> None:
        self._of_process.spend(process, now)
        self._of_user.spend(process.uid, now)
        if len(self._of_process) > self._tidy_above:
            self._of_process.tidy(now)
            self._of_user.tidy(now)
            self._tidy_above = max(_TIDY_AFTER, 2 * len(self._of_process))
