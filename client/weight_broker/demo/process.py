"""The demo's processes: a broker and instances, each started alone and always stopped."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from weight_broker.cli.failure import CommandError
from weight_broker.cli.inspector import Inspector
from weight_broker.demo.orders import Order, Result
from weight_broker.errors import BrokerError
from weight_broker.runtime_directory import ENVIRONMENT_VARIABLE

START_SECONDS = 30.0
_STOP_SECONDS = 10.0
_POLL_SECONDS = 0.1
_LOG_LINES = 15
# These belong to the caller's own broker and service manager.
_FOREIGN_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "RUNTIME_DIRECTORY", ENVIRONMENT_VARIABLE)
_FOREIGN_PREFIXES = tuple(f"WEIGHT_BROKER_{section}_" for section in ("BROKER", "LIMITS", "METRICS", "LOG"))


class Process:
    """A child with its standard error in a file. Its own session keeps Ctrl-C from it: the demo stops its children in
    order."""

    def __init__(
        self, name: str, arguments: list[str], directory: Path, *, prefix: Sequence[str] = (), **variables: str
    ) -> None:
        """`prefix`: a command that becomes the process, for example in a namespace."""
        self.name = name
        self._log = directory / f"{name.replace(' ', '-')}.log"
        environment = {
            variable: value
            for variable, value in os.environ.items()
            if variable not in _FOREIGN_VARIABLES and not variable.startswith(_FOREIGN_PREFIXES)
        }
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                [*prefix, sys.executable, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                # Temporary files of its libraries are removed with the demo's directory, also if the child is killed.
                env=environment | {"TMPDIR": str(directory)} | variables,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._child.pid

    def check_alive(self) -> None:
        """Raises `CommandError` with the end of its log if it has ended."""
        if self._child.poll() is not None:
            raise CommandError(f"{self.name} ended with {self._child.returncode}{self.log_end()}")

    def log_end(self, count: int = _LOG_LINES) -> str:
        """The last lines of its log, for an error message."""
        lines = self._log.read_text(errors="replace").splitlines()[-count:]
        return "".join(f"\n    {line}" for line in lines)

    def ask_to_stop(self) -> None:
        """Ends it in order; does not wait."""
        self._child.terminate()

    def stop(self) -> None:
        """Waits for its end; kills the process after 10 seconds."""
        for stream in (self._child.stdin, self._child.stdout):
            if stream is not None:
                stream.close()
        try:
            self._child.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


class Broker(Process):
    """A broker in the demo's directory; `variables` are settings other than the defaults."""

    def __init__(self, runtime_directory: Path, log_directory: Path, **variables: str) -> None:
        self.runtime_directory = runtime_directory
        super().__init__(
            "the broker",
            ["-m", "weight_brokerd"],
            log_directory,
            **{ENVIRONMENT_VARIABLE: str(runtime_directory), "WEIGHT_BROKER_LOG_FORMAT": "console", **variables},
        )

    def wait_until_ready(self) -> None:
        """Raises `CommandError` if it does not answer within 30 seconds."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            self.check_alive()
            try:
                with Inspector(self.runtime_directory, timeout=1.0) as inspector:
                    inspector.host()
                    return
            except BrokerError:
                if time.monotonic() > deadline:
                    raise CommandError(f"the broker is not ready after {START_SECONDS:.0f} s{self.log_end()}") from None
                time.sleep(_POLL_SECONDS)


class Answering(Process):
    """A child that reads commands as lines on its standard input and answers with lines of JSON."""

    _buffer = b""

    def tell(self, line: str) -> None:
        if self._child.stdin is not None:
            self._child.stdin.write(line.encode() + b"\n")
            self._child.stdin.flush()

    def kill(self) -> None:
        """kill -9; returns when it is gone."""
        self._child.kill()
        self._child.wait()

    def ask_to_stop(self) -> None:
        """Close its input: the child then detaches from the broker and ends."""
        if self._child.stdin is not None:
            self._child.stdin.close()

    def answer(self, event: str, deadline: float, tick: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Its next answer. Raises `CommandError` if the answer is of another event."""
        answer = self.next_answer(deadline, tick)
        if answer.get("event") != event:
            raise CommandError(f"{self.name} answered {answer.get('event')!r}, not {event!r}")
        return answer

    def next_answer(self, deadline: float, tick: Callable[[], None] = lambda: None) -> dict[str, Any]:
        if self._child.stdout is None:
            raise AssertionError("started with a pipe")
        with selectors.DefaultSelector() as selector:
            selector.register(self._child.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                tick()
                if selector.select(_POLL_SECONDS):
                    received = os.read(self._child.stdout.fileno(), 65536)
                    if not received:
                        self._child.wait(_STOP_SECONDS)
                        self.check_alive()
                    self._buffer += received
                elif time.monotonic() > deadline:
                    raise CommandError(f"{self.name} did not answer in time{self.log_end()}")
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Instance(Answering):
    """An instance that loads when `begin` is called."""

    def __init__(self, order: Order, directory: Path) -> None:
        self.order = order
        super().__init__(
            order.name, ["-m", "weight_broker.demo.instance", order.to_argument()], directory, HF_HUB_OFFLINE="1"
        )

    def wait_until_imported(self, deadline: float, tick: Callable[[], None]) -> None:
        """Raises `CommandError` if that takes too long."""
        self.answer("ready", deadline, tick)

    def begin(self) -> None:
        self.tell("begin")

    def result(self, deadline: float, tick: Callable[[], None]) -> Result:
        """Wait for the load to end; the instance stays alive."""
        return Result(**self.answer("done", deadline, tick)["result"])
