"""The demo's processes: a broker and instances, each started alone and always stopped."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
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
# The caller's own broker and service manager are none of the demo's business.
_FOREIGN_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "RUNTIME_DIRECTORY", ENVIRONMENT_VARIABLE)
_FOREIGN_PREFIXES = tuple(f"WEIGHT_BROKER_{section}_" for section in ("BROKER", "LIMITS", "METRICS", "LOG"))


class Process:
    """A child with its standard error in a file of its own. In a session of its own too, so that Ctrl-C reaches the
    demo alone, which then stops its children in order."""

    def __init__(self, name: str, arguments: list[str], directory: Path, **variables: str) -> None:
        self.name = name
        self._log = directory / f"{name.replace(' ', '-')}.log"
        environment = {
            variable: value
            for variable, value in os.environ.items()
            if variable not in _FOREIGN_VARIABLES and not variable.startswith(_FOREIGN_PREFIXES)
        }
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                # What its libraries put among temporary files goes with the demo's, also if it is killed.
                env=environment | {"TMPDIR": str(directory)} | variables,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    def check_alive(self) -> None:
        """Raises `CommandError` with the end of its log if it has ended."""
        if self._child.poll() is not None:
            raise CommandError(f"{self.name} ended with {self._child.returncode}{self.log_end()}")

    def log_end(self, count: int = _LOG_LINES) -> str:
        """The last lines that it wrote, for an error message."""
        lines = self._log.read_text(errors="replace").splitlines()[-count:]
        return "".join(f"\n    {line}" for line in lines)

    def ask_to_stop(self) -> None:
        """Tells it to end, without waiting."""
        self._child.terminate()

    def stop(self) -> None:
        """Waits for its end; kills it if that takes too long."""
        for stream in (self._child.stdin, self._child.stdout):
            if stream is not None:
                stream.close()
        try:
            self._child.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


class Broker(Process):
    """A broker in a directory of the demo's own; `variables` are settings other than the defaults."""

    def __init__(self, runtime_directory: Path, log_directory: Path, **variables: str) -> None:
        self.runtime_directory = runtime_directory
        super().__init__(
            "the broker",
            ["-m", "weight_brokerd"],
            log_directory,
            **{ENVIRONMENT_VARIABLE: str(runtime_directory), "WEIGHT_BROKER_LOG_FORMAT": "console", **variables},
        )

    def wait_until_ready(self) -> None:
        """Returns once it answers."""
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
    """A child that is told what to do by lines on its standard input and answers with lines of JSON."""

    _buffer = b""

    def tell(self, line: str) -> None:
        """Writes one line to it."""
        if self._child.stdin is not None:
            self._child.stdin.write(line.encode() + b"\n")
            self._child.stdin.flush()

    def kill(self) -> None:
        """kill -9; returns when it is gone."""
        self._child.kill()
        self._child.wait()

    def ask_to_stop(self) -> None:
        """The end of its input ends it; it leaves the broker in order."""
        if self._child.stdin is not None:
            self._child.stdin.close()

    def answer(self, event: str, deadline: float, tick: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Its next answer, which has to be of this kind."""
        answer = self.next_answer(deadline, tick)
        if answer.get("event") != event:
            raise CommandError(f"{self.name} answered {answer.get('event')!r}, not {event!r}")
        return answer

    def next_answer(self, deadline: float, tick: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Its next answer."""
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
    """An instance that waits for the word to begin."""

    def __init__(self, order: Order, directory: Path) -> None:
        self.order = order
        super().__init__(
            order.name, ["-m", "weight_broker.demo.instance", order.to_argument()], directory, HF_HUB_OFFLINE="1"
        )

    def wait_until_imported(self, deadline: float, tick: Callable[[], None]) -> None:
        """Returns once it has imported its libraries."""
        self.answer("ready", deadline, tick)

    def begin(self) -> None:
        """Lets it load."""
        self.tell("begin")

    def result(self, deadline: float, tick: Callable[[], None]) -> Result:
        """What it did, once it has; it stays alive."""
        return Result(**self.answer("done", deadline, tick)["result"])
