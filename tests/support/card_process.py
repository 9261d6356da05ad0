"""A process on an emulated Ascend host, which calls what a test tells it: `process.call(acl.malloc, 4096)`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import ParamSpec, TypeVar, cast

from doubles.cann.control import CannHost, Fault
from support.acl import AclError

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


class RemoteFailure(AssertionError):
    """The function raised something other than an AclError; the text is its traceback."""


class CalledProcess:
    """One process; module-level functions are called in its main thread, one after the other."""

    def __init__(self, environment: Mapping[str, str], *, prefix: Sequence[str] = ()) -> None:
        """`prefix`: a program that starts the process, for example in another namespace."""
        ours, theirs = socket.socketpair()
        variables = {**os.environ, **environment, "PYTHONPATH": str(Path(__file__).parents[1])}
        with theirs:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "support.card_main", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=variables,
                stdin=subprocess.DEVNULL,
            )
        self._connection = Connection(ours.detach())

    @property
    def pid(self) -> int:
        """Its pid."""
        return self.process.pid

    def begin(
        self, function: Callable[Arguments, Answer], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Callable[[float], Answer]:
        """Starts a call; what is returned waits so many seconds for its answer."""
        self._connection.send((function.__module__, function.__name__, args, kwargs))

        def answer(timeout: float = 60.0) -> Answer:
            assert self._connection.poll(timeout), f"process {self.pid} does not answer within {timeout} s"
            try:
                kind, value = self._connection.recv()
            except (EOFError, ConnectionResetError):
                raise RemoteFailure(f"process {self.pid} died: {self.process.wait(60)}") from None
            if kind == "refused":
                raise cast("AclError", value)
            if kind == "failed":
                raise RemoteFailure(value)
            return cast("Answer", value)

        return answer

    def call(self, function: Callable[Arguments, Answer], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
        """Calls the function there. Raises AclError if it did, else RemoteFailure."""
        return self.begin(function, *args, **kwargs)(60.0)

    def kill(self) -> None:
        """kill -9."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def leave(self) -> int:
        """Lets it end by itself, as a program that forgot nothing or everything; returns its exit status."""
        self._connection.close()
        return self.process.wait(60)

    def close(self) -> None:
        """Ends it if it still runs."""
        self._connection.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class CardProcess(CalledProcess):
    """A process on an emulated Ascend host."""

    def __init__(
        self,
        host: CannHost,
        *,
        faults: Mapping[Fault, float] | None = None,
        strict: bool = True,
        visible: str | None = None,
        container: Sequence[int] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.host = host
        double = host.environment(faults=faults, strict=strict, visible=visible, container=container)
        super().__init__({**double, **(environment or {})})

    @property
    def live(self) -> dict[str, int]:
        """What it has that it should give back."""
        return self.host.live(self.pid)
