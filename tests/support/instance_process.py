"""An instance: a process of its own that does what a test tells it, and can be killed while it does.

A test calls module-level functions of `support.actions` in it; the first argument they get is the process's `State`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


class RemoteError(AssertionError):
    """The function raised something other than a `BrokerError`; the text is its traceback."""


class InstanceProcess:
    """One process."""

    def __init__(self, runtime_directory: Path, name: str = "") -> None:
        ours, theirs = socket.socketpair()
        environment = {**os.environ, "WEIGHT_BROKER_RUNTIME_DIRECTORY": str(runtime_directory)}
        environment["PYTHONPATH"] = str(Path(__file__).parents[1])
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "support.instance_main", str(theirs.fileno()), name],
                pass_fds=[theirs.fileno()],
                env=environment,
            )
        self._connection = Connection(ours.detach())

    @property
    def pid(self) -> int:
        """Its pid."""
        return self.process.pid

    def begin(
        self,
        action: Callable[Concatenate[Any, Arguments], Answer],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> None:
        """Starts the action; `result` waits for it."""
        self._connection.send((action.__module__, action.__name__, args, kwargs))

    def result(self, timeout: float = 60.0) -> Any:
        """What the action returned; raises what it raised if that is a `BrokerError`."""
        assert self._connection.poll(timeout), f"instance {self.pid} does not answer within {timeout} s"
        kind, value = self._connection.recv()
        if kind == "returned":
            return value
        if kind == "broker error":
            raise value
        raise RemoteError(value)

    def call(
        self,
        action: Callable[Concatenate[Any, Arguments], Answer],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Answer:
        """Does the action and waits for it."""
        self.begin(action, *args, **kwargs)
        answer: Answer = self.result()
        return answer

    def kill(self) -> None:
        """kill -9."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        """Ends the process if it still runs."""
        self._connection.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
