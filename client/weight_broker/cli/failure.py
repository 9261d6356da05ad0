"""How the command line ends when something is wrong."""

from __future__ import annotations

import enum

from weight_broker.errors import BrokerError, Reason


class ExitCode(enum.IntEnum):
    """What the process returns; part of the interface."""

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


class CommandError(Exception):
    """Ends the command with a message for people and an exit code."""

    def __init__(self, message: str, code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.code = code


def exit_code_of(error: BrokerError) -> ExitCode:
    """The exit code for what the broker answered."""
    return _CODES.get(error.reason, ExitCode.FAILED)
