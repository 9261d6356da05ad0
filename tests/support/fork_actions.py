"""What instances do around a fork."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from support.actions import State, acquire, checksum, prepare
from weight_broker import BrokerError


def _in_child(work: Callable[[], str]) -> str:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            answer = work()
        except BaseException as error:  # noqa: BLE001 - the parent is to see it
            answer = f"{type(error).__name__}: {error}"
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    return answer


def acquire_in_child(state: State, /, model: str) -> str:
    """Acquires in a forked child, with the client that the parent has used; returns the checksum."""

    def work() -> str:
        prepare(state)
        acquire(state, model)
        return checksum(state.arrays)

    return _in_child(work)


def retract_in_child(state: State, /) -> str:
    """Tries to retract the parent's publications in a child, then closes the client there."""

    def work() -> str:
        try:
            state.publications[0].retract()
        except BrokerError as error:
            state.client.close()
            return str(error)
        return "retracted"

    return _in_child(work)


def child_that_lingers(state: State, /) -> int:
    """Forks a child that does nothing until it is killed; returns its pid."""
    pid = os.fork()
    if pid == 0:
        time.sleep(600)  # and it does not outlive a test that could not kill it for ever
        os._exit(0)
    return pid
