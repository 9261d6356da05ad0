"""Which connections are too many: a process has a bounded number, and where there are too many in all, the newest of
the process with the most gives way.

A process may open one connection more than it may use: its calls are refused by name. Further ones are closed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import Generic, TypeVar

from weight_brokerd.core.model import Process

Connection = TypeVar("Connection", bound=Hashable)


class Connections(Generic[Connection]):
    """The open connections, of each process the oldest first."""

    def __init__(self, *, per_process: int, total: int) -> None:
        self._per_process = per_process
        self._total = total
        self._processes: dict[Connection, Process] = {}
        self._users: dict[int, dict[Process, dict[Connection, None]]] = {}
        self._of_user = Counter[int]()

    def __len__(self) -> int:
        return len(self._processes)

    def has_all(self, process: Process) -> bool:
        """Whether the process has as many as it may open."""
        return len(self._users.get(process.uid, {}).get(process, ())) > self._per_process

    def is_excess(self, connection: Connection) -> bool:
        """Whether the process has more than it may use, and this is the newest."""
        process = self._processes[connection]
        of_process = self._users[process.uid][process]
        return len(of_process) > self._per_process and next(reversed(of_process)) == connection

    def process_of(self, connection: Connection) -> Process:
        """Whose it is."""
        return self._processes[connection]

    def add(self, process: Process, connection: Connection) -> None:
        """A process has connected."""
        self._processes[connection] = process
        self._users.setdefault(process.uid, {}).setdefault(process, {})[connection] = None
        self._of_user[process.uid] += 1

    def discard(self, connection: Connection) -> None:
        """The connection has ended."""
        process = self._processes.pop(connection, None)
        if process is None:
            return
        processes = self._users[process.uid]
        del processes[process][connection]
        self._of_user[process.uid] -= 1
        if not processes[process]:
            del processes[process]
        if not processes:
            del self._users[process.uid], self._of_user[process.uid]

    def one_too_many(self) -> Connection | None:
        """The connection that gives way if there are too many in all: the newest of the process with the most, of the
        user with the most. None if there is room."""
        if len(self) <= self._total:
            return None
        processes = self._users[max(self._of_user, key=lambda uid: self._of_user[uid])]
        most = max(processes.values(), key=len)
        return next(reversed(most))
