"""Connections that have not said Hello: few in all, and of each process, so that no process fills the room."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

MAXIMUM_STRANGERS = 128
MAXIMUM_STRANGERS_OF_PROCESS = 32

Connection = TypeVar("Connection", bound=Hashable)


class Strangers(Generic[Connection]):
    """The connections, oldest first, by process."""

    def __init__(self) -> None:
        self._by_process: dict[Hashable, dict[Connection, None]] = {}
        self._process_of: dict[Connection, Hashable] = {}

    def __contains__(self, connection: object) -> bool:
        return connection in self._process_of

    def __iter__(self) -> Iterator[Connection]:
        return iter(list(self._process_of))

    def add(self, process: Hashable, connection: Connection) -> None:
        """A process has connected."""
        self._process_of[connection] = process
        self._by_process.setdefault(process, {})[connection] = None

    def discard(self, connection: Connection) -> None:
        """The connection has said Hello or has ended."""
        process = self._process_of.pop(connection, None)
        if process is not None:
            connections = self._by_process[process]
            del connections[connection]
            if not connections:
                del self._by_process[process]

    def one_too_many(self, process: Hashable) -> Connection | None:
        """The connection that gives way to a new one of the process: its own oldest if it has many, else the oldest of
        the process with the most. None if there is room."""
        if len(self._by_process.get(process, ())) >= MAXIMUM_STRANGERS_OF_PROCESS:
            return next(iter(self._by_process[process]))
        if len(self._process_of) < MAXIMUM_STRANGERS:
            return None
        most = max(self._by_process, key=lambda other: len(self._by_process[other]))
        return next(iter(self._by_process[most]))
