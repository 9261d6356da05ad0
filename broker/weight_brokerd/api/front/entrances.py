"""gRPC sockets that have no path: each is for one attached process, which gets the way to it as a descriptor.

gRPC's clients do not wait for room in a backlog. On a socket that every process can reach, one that connects without
end keeps all others from connecting.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

from weight_brokerd.attach.acceptor import Acceptor, listen
from weight_brokerd.attach.peer import is_pid_seen
from weight_brokerd.core.model import Process

ENTRANCE_SOCKET = "entry.sock"
"""While it is opened."""
_BACKLOG = 64
_PERMISSIONS = 0o666
"""Only the holder of the descriptor finds it."""


class Entrances:
    """Of all attached processes, by instance."""

    def __init__(
        self,
        directory: Path,
        admit: Callable[[socket.socket, Process], None],
        refuse: Callable[[socket.socket], None],
    ) -> None:
        """As for `Acceptor`."""
        self._path = directory / ENTRANCE_SOCKET
        self._admit = admit
        self._refuse = refuse
        self._acceptors: dict[str, Acceptor] = {}
        self._loop = asyncio.get_running_loop()

    def open(self, instance_id: str, process: Process) -> int:
        """A descriptor to connect through, as /proc/self/fd/N; lent until the call returns to the event loop. Raises
        `OSError`."""
        listener = listen(self._path, socket.SOCK_STREAM, _BACKLOG)
        try:
            self._path.chmod(_PERMISSIONS)
            way = os.open(self._path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            listener.close()
            raise
        finally:
            self._path.unlink(missing_ok=True)
        self._loop.call_soon(os.close, way)
        self._acceptors[instance_id] = Acceptor(listener, partial(self._admit_owner, process), self._refuse)
        return way

    def close(self, instance_id: str) -> None:
        """The process has gone. Connections stay. Idempotent."""
        acceptor = self._acceptors.pop(instance_id, None)
        if acceptor is not None:
            acceptor.close()

    def close_all(self) -> None:
        """Idempotent."""
        for instance_id in list(self._acceptors):
            self.close(instance_id)

    def _admit_owner(self, owner: Process, client: socket.socket, process: Process) -> None:
        if _is_same(owner, process):
            self._admit(client, owner)
            return
        with contextlib.suppress(OSError):
            self._refuse(client)
        client.close()


def _is_same(owner: Process, process: Process) -> bool:
    """By the pid, as a process may change its user; by the user where the broker sees no pid."""
    if is_pid_seen(owner) or is_pid_seen(process):
        return owner.name == process.name
    return owner.uid == process.uid
