"""Accepts the connections of a listening unix socket, a few in each turn of the event loop.

A process that connects too often is refused. Refusals take a bounded part of the loop's time: between them the loop
does not accept, and a full backlog makes processes wait in connect(2), in the order of the kernel.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import structlog

from weight_brokerd.attach.peer import process_of
from weight_brokerd.core.conduct.pace import Pace, Paces
from weight_brokerd.core.model import Process

CONNECTION_PACE = Pace(per_second=100, burst=400)
"""Of each process."""

_REFUSED_AT_ONCE = 32
_ADMITTED_AT_ONCE = 16
_REST_AFTER_REFUSALS = 3.0
"""Times as long as the refusals took."""
_PAUSE_WITHOUT_FILES_SECONDS = 1.0
_OUT_OF_FILES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_PACES_KEPT = 1024

log = structlog.get_logger("weight_brokerd.attach")


def listen(path: Path, kind: socket.SocketKind, backlog: int) -> socket.socket:
    """A listening socket. The caller holds the runtime lock and has set the umask; a stale socket is replaced."""
    listener = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        listener.bind(os.fspath(path))
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    return listener


class Acceptor:
    """Takes a listening socket over and serves it on the running event loop."""

    def __init__(
        self,
        listener: socket.socket,
        admit: Callable[[socket.socket, Process], None],
        refuse: Callable[[socket.socket], None],
    ) -> None:
        """`admit` takes a connection over. `refuse` says that its process connects too often; then it is closed."""
        self._listener: socket.socket | None = listener
        self._admit = admit
        self._refuse = refuse
        self._loop = asyncio.get_running_loop()
        self._paces = Paces(CONNECTION_PACE)
        self._loop.add_reader(listener.fileno(), self._accept)

    def close(self) -> None:
        """Accept nothing more. The socket's file stays. Idempotent."""
        if self._listener is not None:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None

    def _accept(self) -> None:
        begun = self._loop.time()
        admitted = refused = 0
        while admitted < _ADMITTED_AT_ONCE and refused < _REFUSED_AT_ONCE:
            accepted = self._next()
            if accepted is None:
                break
            if self._let_in(accepted):
                admitted += 1
            else:
                refused += 1
        if refused:
            self._pause(_REST_AFTER_REFUSALS * (self._loop.time() - begun))

    def _next(self) -> socket.socket | None:
        if self._listener is None:
            return None
        try:
            return self._listener.accept()[0]
        except (BlockingIOError, ConnectionError, InterruptedError):
            return None
        except OSError as error:
            if error.errno not in _OUT_OF_FILES:
                raise
            # The listener stays readable: without a pause the loop would do nothing but fail to accept.
            log.error("out_of_files", error=os.strerror(error.errno), hint="raise LimitNOFILE")
            self._pause(_PAUSE_WITHOUT_FILES_SECONDS)
            return None

    def _let_in(self, accepted: socket.socket) -> bool:
        """False for a connection of a process that connects too often; without a line in the log, which a process could
        fill."""
        accepted.setblocking(False)
        process = process_of(accepted)
        if self._keeps_pace(process):
            self._admit(accepted, process)
            return True
        with contextlib.suppress(OSError):
            self._refuse(accepted)
        accepted.close()
        return False

    def _keeps_pace(self, process: Process) -> bool:
        now = self._loop.time()
        if len(self._paces) > _PACES_KEPT:
            self._paces.tidy(now)
        if self._paces.wait(process, now) > 0:
            return False
        self._paces.spend(process, now)
        return True

    def _pause(self, seconds: float) -> None:
        if self._listener is not None:
            self._loop.remove_reader(self._listener.fileno())
            self._loop.call_later(seconds, self._resume)

    def _resume(self) -> None:
        if self._listener is not None:
            self._loop.add_reader(self._listener.fileno(), self._accept)
