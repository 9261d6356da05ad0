"""How a command ends: exit codes, errors, and signals, which wait until they do no harm."""

from __future__ import annotations

import enum
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from weight_broker.errors import BrokerError, Reason
from weight_broker.runtime_directory import DENIED_METADATA


class ExitCode(enum.IntEnum):
    """Exit status of the process; part of the interface."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    UNAVAILABLE = 3
    NOT_FOUND = 4
    NOT_PERMITTED = 5
    INTERRUPTED = 130


EXIT_CODES_TEXT = """exit codes:
  0    done
  1    failed: what the broker refused, or what the demo found, is on standard error;
       for the doctor: there is a problem
  2    wrong usage, or a missing package
  3    no broker answers
  4    no such weight set or publication
  5    not permitted
  130  interrupted
"""

_CODES = {
    Reason.BROKER_UNAVAILABLE: ExitCode.UNAVAILABLE,
    Reason.WEIGHTS_NOT_FOUND: ExitCode.NOT_FOUND,
    Reason.PUBLICATION_NOT_FOUND: ExitCode.NOT_FOUND,
    Reason.NOT_ADMINISTRATOR: ExitCode.NOT_PERMITTED,
    Reason.INVALID_ARGUMENT: ExitCode.USAGE,
}

_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_AGAIN_SECONDS = 0.05
_IMPORT_SYSTEM = "<frozen importlib"

_holds: list[None] = []
_is_pending = False


class CommandError(Exception):
    """Ends the command with a message and an exit code."""

    def __init__(self, message: str, code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.code = code


def exit_code_of(error: BrokerError) -> ExitCode:
    if DENIED_METADATA in error.metadata:
        return ExitCode.NOT_PERMITTED
    return _CODES.get(error.reason, ExitCode.FAILED)


@contextmanager
def stoppable() -> Iterator[None]:
    """A signal ends the block. It waits while a module is imported or within `held`: an exception in the middle of an
    import is lost (extension modules and the import system's callbacks drop it) or leaves half a module."""
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
    """A signal waits for the end of the block: for blocks that create a resource and note that it must be removed."""
    _holds.append(None)
    try:
        yield
    finally:
        _holds.pop()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals are ignored within the block. For cleaning up, which is bounded in time."""
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
