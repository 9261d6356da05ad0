"""Accepts the connections of the gRPC socket, counts them by process and relays them to the gRPC server.

gRPC in Python says of a unix socket's peer only its name, and clients have none. So the server listens where only this
process finds it, and each relay connects there under a name that stands for the client's process. The name is random:
a connection under another one was not made here.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections import Counter
from functools import partial
from pathlib import Path

import structlog

from weight_brokerd.api.front.allowances import Allowances
from weight_brokerd.api.front.entrances import Entrances
from weight_brokerd.api.front.relay import BUFFER_BYTES, Relay
from weight_brokerd.attach.acceptor import Acceptor, listen
from weight_brokerd.attach.peer import process_of
from weight_brokerd.core.conduct.connections import Connections
from weight_brokerd.core.conduct.quota import Bound, refusal
from weight_brokerd.core.model import Process

_BACKLOG = 4096
"""Long: gRPC's clients do not wait for room."""
_REPORT_SECONDS = 1.0

log = structlog.get_logger("weight_brokerd.api.front")


class Front:
    """Serves the gRPC socket on the running event loop."""

    def __init__(self, directory: Path, *, per_process: int, total: int) -> None:
        """How many connections stay open, of one process and in all. `directory`: where only the broker makes files."""
        self.entrances = Entrances(directory, self._admit, self._refuse)
        self._bound = Bound("limits.connections_per_process", per_process)
        self._connections: Connections[Relay] = Connections(per_process=per_process, total=total)
        self._relays: dict[str, Relay] = {}
        """By the name that gRPC knows the peer by."""
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._acceptor: Acceptor | None = None
        self._server = -1
        self._closed = Counter[Process]()
        """Connections that were too many, since they were last reported."""
        self._all_ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.allowances = Allowances(self._loop.time)

    def hide(self, server: Path) -> None:
        """Keep the way to the listening socket of the gRPC server, and remove its path."""
        self._server = os.open(server, os.O_PATH | os.O_CLOEXEC)
        server.unlink()

    def open(self, path: Path) -> None:
        """Binds and listens. The caller holds the runtime lock and has set the umask; a stale socket is replaced."""
        self._acceptor = Acceptor(listen(path, socket.SOCK_STREAM, _BACKLOG), self._admit, self._refuse)

    def process_of(self, peer: str) -> Process | None:
        """The process behind a call's peer; None if its connection has ended."""
        relay = self._relays.get(peer)
        return self._connections.process_of(relay) if relay is not None else None

    def require_room(self, peer: str) -> None:
        """Raises LIMIT_EXCEEDED for the connection of a process that has too many."""
        relay = self._relays.get(peer)
        if relay is not None and self._connections.is_excess(relay):
            name = self._connections.process_of(relay).name
            raise refusal(f"process {name} has more than {self._bound.most} gRPC connections", self._bound)

    def stop_accepting(self) -> None:
        """Existing connections stay. Idempotent."""
        if self._acceptor is not None:
            self._acceptor.close()
        self.entrances.close_all()

    async def close(self, seconds: float) -> None:
        """After the server's end: clients have so long to read its last words. Idempotent."""
        self.stop_accepting()
        if self._relays:
            self._all_ended.clear()
            await asyncio.wait({self._loop.create_task(self._all_ended.wait())}, timeout=seconds)
        for relay in list(self._relays.values()):
            relay.close()
        if self._server >= 0:
            os.close(self._server)
            self._server = -1

    def _admit(self, client: socket.socket, process: Process) -> None:
        name = f"weight-broker-{secrets.token_hex(8)}"
        server = None if self._connections.has_all(process) else self._connect(name)
        if server is None:
            self._count(process)
            client.close()
            return
        peer = f"unix-abstract:{name}"
        relay = Relay(client, server, self._buffer, partial(self._forget, peer), self.allowances.of(process))
        self._relays[peer] = relay
        self._connections.add(process, relay)
        excess = self._connections.one_too_many()
        if excess is not None:
            self._count(self._connections.process_of(excess))
            excess.close()

    def _connect(self, name: str) -> socket.socket | None:
        """A connection to the gRPC server; None if there can be none now."""
        try:
            server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        except OSError:
            return None
        try:
            server.bind(f"\0{name}")
            server.connect(f"/proc/self/fd/{self._server}")
        except OSError:
            server.close()
            return None
        return server

    def _forget(self, peer: str) -> None:
        self._connections.discard(self._relays.pop(peer))
        if not self._relays:
            self._all_ended.set()

    def _refuse(self, client: socket.socket) -> None:
        self._count(process_of(client))

    def _count(self, process: Process) -> None:
        """For the log, which a process must not fill."""
        if not self._closed:
            self._loop.call_later(_REPORT_SECONDS, self._report)
        self._closed[process] += 1

    def _report(self) -> None:
        for process, count in self._closed.items():
            log.warning("connections_closed", pid=process.name, uid=process.uid, count=count)
        self._closed.clear()
