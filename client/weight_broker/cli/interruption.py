"""Ctrl-C and SIGTERM end a command with KeyboardInterrupt, at once or at the next moment at which that does no harm."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_AGAIN_SECONDS = 0.05
_IMPORT_SYSTEM = "<frozen importlib"

_holds: list[None] = []
_is_pending = False


@contextmanager
def stoppable() -> Iterator[None]:
    """A signal ends the block. While a module is imported or `held` holds it waits: an exception in the middle of an
    import is lost (extension modules and the import system's own callbacks drop it) or leaves half a module."""
    global _is_pending
    before = {number: signal.signal(number, _interrupt) for number in (*_NUMBERS, signal.SIGALRM)}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        if _is_pending:
            _is_pending = False
            raise KeyboardInterrupt


@contextmanager
def held() -> Iterator[None]:
    """A signal waits for the end of the block: between making what has to be removed and noting that it is there."""
    _holds.append(None)
    try:
        yield
    finally:
        _holds.pop()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A second Ctrl-C does not stop the cleaning up, which is bounded in time."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (*_NUMBERS, signal.SIGALRM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _is_pending
    _is_pending = bool(_holds) or _is_importing(frame)
    if _is_pending:
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
    else:
        raise KeyboardInterrupt


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith(_IMPORT_SYSTEM):
            return True
        frame = frame.f_back
    return False
