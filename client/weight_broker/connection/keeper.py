"""Keeps what this process has published published, also across restarts of the broker.

One daemon thread per process; it exists only while something is published. It sleeps in poll() on the plain attach
sockets (no gRPC, no periodic work) until one reports its end, then attaches again and publishes again by reference: the
memory itself has not changed. It is gone after a fork, and so is its work list: the publications are the parent's.
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

from weight_broker.errors import BrokerError, BrokerUnavailable

FIRST_RETRY_SECONDS = 0.2
LAST_RETRY_SECONDS = 1.0
_EXIT_SECONDS = 1.0

_logger = logging.getLogger("weight_broker")


class Kept(Protocol):
    """Something that has to be there whenever a broker is."""

    @property
    def route(self) -> object:
        """What it reaches the broker through; if that does not work for one, it does not for any."""

    def restore(self) -> None:
        """Makes it so if it is not; raises `BrokerError` if that does not work now."""

    def fileno(self) -> int:
        """The socket whose end says that it has to be restored; -1 if there is none."""


class Keeper:
    """The thread and its work list."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: set[Kept] = set()
        self._thread: threading.Thread | None = None
        self._bell = -1

    def add(self, kept: Kept) -> None:
        """From now on `kept` is restored when its session ends."""
        with self._lock:
            self._kept.add(kept)
            if self._thread is None:
                self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                self._thread = threading.Thread(target=self._run, name="weight-broker-keeper", daemon=True)
                self._thread.start()
            else:
                os.eventfd_write(self._bell, 1)

    def remove(self, kept: Kept) -> None:
        """Forgets `kept`; the thread ends when nothing is left."""
        with self._lock:
            self._kept.discard(kept)
        self.ring()

    def ring(self) -> None:
        """Makes the thread look at everything now."""
        with self._lock:
            if self._bell >= 0:
                os.eventfd_write(self._bell, 1)

    def stop(self) -> None:
        """Forgets everything and waits briefly for the thread: it must not be in a call when the interpreter ends."""
        with self._lock:
            self._kept.clear()
            thread = self._thread
        self.ring()
        if thread is not None and thread is not threading.current_thread():
            thread.join(_EXIT_SECONDS)

    def forget_after_fork(self) -> None:
        """For a forked child: there is no thread, and nothing of what is kept is the child's."""
        self._lock = threading.Lock()
        self._kept = set()
        self._thread = None
        bell, self._bell = self._bell, -1
        if bell >= 0:
            os.close(bell)

    def _run(self) -> None:
        retry_seconds = FIRST_RETRY_SECONDS
        told: set[str] = set()
        while True:
            with self._lock:
                kept = list(self._kept)
                if not kept:
                    self._end()
                    return
                bell = self._bell
            broken = _restore(kept, told)
            if not broken:
                retry_seconds = FIRST_RETRY_SECONDS
                told.clear()
            _sleep(bell, (publication.fileno() for publication in kept), retry_seconds if broken else None)
            if broken:
                retry_seconds = min(retry_seconds * 1.5, LAST_RETRY_SECONDS)

    def _end(self) -> None:
        bell, self._bell = self._bell, -1
        self._thread = None
        os.close(bell)


def _restore(kept: Iterable[Kept], told: set[str]) -> bool:
    """Restores everything; True if something could not be. `told` has the reasons that were logged as warnings since
    all was well: each is one only once, since this is tried for as long as it does not work."""
    broken = False
    blocked: set[int] = set()
    for publication in kept:
        if id(publication.route) in blocked:
            continue
        try:
            publication.restore()
        except BrokerError as error:
            level = logging.DEBUG if error.reason in told else logging.WARNING
            told.add(error.reason)
            _logger.log(level, "%r cannot be published now; this is tried again: %s", publication, error)
            broken = True
            if isinstance(error, BrokerUnavailable):
                blocked.add(id(publication.route))
        except Exception:  # the thread serves every client of the process: one that is closed meanwhile must not end it
            _logger.exception("%r cannot be published now", publication)
            broken = True
    return broken


def _sleep(bell: int, sockets: Iterable[int], seconds: float | None) -> None:
    """Returns when the bell rings, a socket ends or the time is over. While something is broken, ended sockets do not
    count: they would end every sleep at once."""
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
"""The keeper of this process."""

os.register_at_fork(after_in_child=KEEPER.forget_after_fork)
atexit.register(KEEPER.stop)
