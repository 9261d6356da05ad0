"""The processes of a row, which call a driver. A fault of a device ends a process, and no other row."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any, Self, cast

SECONDS = 60.0
"""The longest that a call may take; then its process is killed."""

Argument = tuple[str, Any]
"""Kind and value, as `weight_brokerd.proof.worker` reads them."""


class NotRun(Exception):
    """The row cannot be run here; the text is the reason."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call returned."""

    code: int
    out: list[Any]
    words: str

    @property
    def value(self) -> Any:
        """The first out argument."""
        return self.out[0] if self.out else None


class DriverProcess:
    """A process that calls a driver."""

    def __init__(
        self, libraries: Sequence[str], environment: Mapping[str, str], *, prefix: Sequence[str] = (), user: int = -1
    ) -> None:
        """`prefix`: a program that starts the process, for example in other namespaces. `user`: the effective and real
        uid that the process takes before its first call."""
        command = [*prefix, sys.executable, "-m", "weight_brokerd.proof.worker", f"--user={user}", *libraries]
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=dict(environment),
        )
        self._in, self._out = cast("IO[str]", self._child.stdin), cast("IO[str]", self._child.stdout)

    def call(self, name: str, *arguments: Argument, thread: bool = False) -> Answer:
        """Calls a function. `thread`: in a fresh thread. Raises NotRun if the function or the process is gone."""
        with contextlib.suppress(BrokenPipeError):
            self._in.write(json.dumps({"call": name, "arguments": arguments, "thread": thread}) + "\n")
            self._in.flush()
        timer = threading.Timer(SECONDS, self._child.kill)
        timer.start()
        line = self._out.readline()
        timer.cancel()
        if not line:
            raise NotRun(f"the process ended with {self._child.wait()} in {name}")
        found = json.loads(line)
        if found["code"] is None:
            raise NotRun(f"this driver has no {name}")
        return Answer(found["code"], found["out"], found["words"])

    def code(self, name: str, *arguments: Argument, thread: bool = False) -> int:
        """The code of a call."""
        return self.call(name, *arguments, thread=thread).code

    def value(self, name: str, *arguments: Argument) -> Any:
        """The first out argument of a call. Raises NotRun if the call fails: the row is about another call."""
        answer = self.call(name, *arguments)
        if answer.code:
            raise NotRun(f"{name} failed with {answer.code}: {answer.words}")
        return answer.value

    def kill(self) -> None:
        """kill -9."""
        self._child.kill()
        self._child.wait()
        self._in.close()
        self._out.close()


class Scene:
    """The processes of one row. A context manager: they are gone at its end."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        """`environment`: what every process has; this process's own if left out."""
        self.environment = dict(os.environ if environment is None else environment)
        self.processes: list[DriverProcess] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            process.kill()
