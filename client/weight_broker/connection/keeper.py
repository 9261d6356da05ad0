"""Keeps the publications of this process published across restarts of the broker.

One daemon thread per process; it exists only while there are publications. It sleeps in poll() on the plain attach
sockets (no gRPC, no periodic work) until one reports its end, then attaches again and publishes again by reference: the
memory itself has not changed. A forked child has neither the thread nor its work list: the
publications belong to the parent.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import select
import threading
from collections.abc import Iterable
from typing import Protocol

from weight_broker.connection import room
from weight_broker.errors import BrokerError, BrokerUnavailable

FIRST_RETRY_SECONDS = 0.2
LAST_RETRY_SECONDS = 1.0
_EXIT_SECONDS = 1.0

_logger = logging.getLogger("weight_broker")


class Kept(Protocol):
    """A publication, as the keeper sees it."""

    @property
    def route(self) -> object:
        """The way to the broker. Publications with the same route are unreachable together."""

    def restore(self) -> None:
        """Publish again if the session has ended. Raises `BrokerError` if that does not work now."""

    def fileno(self) -> int:
        """The socket whose end calls for `restore`; -1 if there is none."""


class Keeper:
    """The thread and its work list."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: set[Kept] = set()
        self._thread: threading.Thread | None = None
        self._bell = -1

    def add(self, kept: Kept) -> None:
        """`kept` is restored whenever its session ends. Raises `BrokerUnavailable` if there is no thread to do so."""
        with self._lock:
            if self._thread is None:
                self._start()
            else:
                os.eventfd_write(self._bell, 1)
            self._kept.add(kept)

    def remove(self, kept: Kept) -> None:
        """The thread ends with the last entry."""
        with self._lock:
            self._kept.discard(kept)
        self.ring()

    def ring(self) -> None:
        """Wake the thread: every entry is checked now."""
        with self._lock:
            if self._bell >= 0:
                os.eventfd_write(self._bell, 1)

    def stop(self) -> None:
        """Clear the work list and wait briefly for the thread, which must not be in a call when the interpreter
        ends."""
        with self._lock:
            self._kept.clear()
            thread = self._thread
        self.ring()
        if thread is not None and thread is not threading.current_thread():
            thread.join(_EXIT_SECONDS)

    def forget_after_fork(self) -> None:
        """For a forked child: it has no thread and no publications."""
        self._lock = threading.Lock()
        self._kept = set()
        self._thread = None
        bell, self._bell = self._bell, -1
        if bell >= 0:
            os.close(bell)

    def _start(self) -> None:
        self._bell = room.open_bell()
        self._thread = threading.Thread(target=self._run, name="weight-broker-keeper", daemon=True)
        try:
            room.start(self._thread)
        except BrokerUnavailable:
            self._end()
            raise

    def _run(self) -> None:
        retry_seconds = FIRST_RETRY_SECONDS
        warned: set[str] = set()
        while True:
            with self._lock:
                kept = list(self._kept)
                if not kept:
                    self._end()
                    return
                bell = self._bell
            broken = _restore(kept, warned)
            if not broken:
                retry_seconds = FIRST_RETRY_SECONDS
                warned.clear()
            _sleep(bell, (publication.fileno() for publication in kept), retry_seconds if broken else None)
            if broken:
                retry_seconds = min(retry_seconds * 1.5, LAST_RETRY_SECONDS)

    def _end(self) -> None:
        bell, self._bell = self._bell, -1
        self._thread = None
        os.close(bell)


def _restore(kept: Iterable[Kept], warned: set[str]) -> bool:
    """True if a publication could not be restored. `warned` has the reasons that were logged as warnings since the last
    success: retries go on without end, so each reason is a warning only once."""
    broken = False
    blocked: set[int] = set()
    for publication in kept:
        if id(publication.route) in blocked:
            continue
        try:
            publication.restore()
        except BrokerError as error:
            level = logging.DEBUG if error.reason in warned else logging.WARNING
            warned.add(error.reason)
            _logger.log(level, "%r cannot be published now; the next attempt follows: %s", publication, error)
            broken = True
            if isinstance(error, BrokerUnavailable):
                blocked.add(id(publication.route))
        except Exception:  # a client that closes meanwhile must not end the thread of all clients
            _logger.exception("%r cannot be published now", publication)
            broken = True
    return broken


def _sleep(bell: int, sockets: Iterable[int], seconds: float | None) -> None:
    """Return when the bell rings, a socket ends or the time is over. With `seconds` (a publication is broken) sockets
    do not count: ended ones would end every sleep at once."""
    poller = select.poll()
    poller.register(bell, select.POLLIN)
    if seconds is None:
        for descriptor in set(sockets):
            if descriptor >= 0:
                poller.register(descriptor, select.POLLRDHUP)
    poller.poll(None if seconds is None else seconds * 1000)
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(bell)


KEEPER = Keeper()

os.register_at_fork(after_in_child=KEEPER.forget_after_fork)
atexit.register(KEEPER.stop)
