"""Processes of the rows about the datasystem: a worker, and those of `ascend_check.process` that have a client."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

from weight_brokerd.ascend_check.contract.driver import PORTS_CHOSEN, Call, NotRun, Scene

_READY_SECONDS = _CONNECT_SECONDS = 120.0
"""More than a row has on a machine in order: there the row's own limit counts."""
_POLL_SECONDS = 0.05


@contextmanager
def worker(directory: Path) -> Iterator[tuple[str, int]]:
    """A worker of the installed wheel, or that of DS_WORKER_ADDR. Raises NotRun if there is none."""
    if address := os.environ.get("DS_WORKER_ADDR"):
        host, _, number = address.rpartition(":")
        yield host.strip("[]"), int(number)
        return
    try:
        from weight_brokerd.config.settings import DatasystemSettings
        from weight_brokerd.datasystem import worker_command
    except ImportError as error:
        raise NotRun(f"install weight-broker[broker]: {error}") from error
    files = worker_command.WorkerFiles(directory / "datasystem")
    files.directory.mkdir()
    port, metastore = _free_ports(worker_command.HOST)
    try:
        command = worker_command.command(
            worker_command.wheel(), DatasystemSettings(), files, port=port, metastore_port=metastore
        )
    except worker_command.NoWheelError as error:
        raise NotRun(str(error)) from error
    with files.output.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=files.directory, env=worker_command.environment(), stdout=output, stderr=output
        )
    try:
        _wait(process, files.ready)
        yield worker_command.HOST, port
    finally:
        process.kill()
        process.wait()


def _wait(process: subprocess.Popen[bytes], ready: Path) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise NotRun(f"the datasystem worker does not serve (it ended with {process.poll()})")
        time.sleep(_POLL_SECONDS)


def _free_ports(host: str) -> tuple[int, int]:
    with socket.create_server((host, 0)) as one, socket.create_server((host, 0)) as other:
        return one.getsockname()[1], other.getsockname()[1]


class StoreProcess:
    """A process on a card, with what the broker's card processes have. A context manager: it is gone at the end."""

    def __init__(self, scene: Scene, card: int, directory: Path) -> None:
        """Opens the card. Raises NotRun if that is not possible."""
        self._scene = scene
        variables = {**scene.environment, **PORTS_CHOSEN, "DATASYSTEM_CLIENT_LOG_DIR": str(directory / "clients")}
        if preload := variables.get("WEIGHT_BROKER_CARDS_PRELOAD"):
            variables["LD_PRELOAD"] = preload
        self._child = subprocess.Popen(
            [sys.executable, "-m", "weight_brokerd.ascend_check.process", str(card)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=variables,
        )
        self._in, self._out = cast("IO[str]", self._child.stdin), cast("IO[str]", self._child.stdout)
        self.ask("open")

    def ask(self, step: str, **arguments: Any) -> dict[str, Any]:
        """Does one step. Raises NotRun with the words of whatever refused it."""
        began = time.monotonic()
        try:
            self._in.write(json.dumps({"do": step, **arguments}) + "\n")
            self._in.flush()
        except BrokenPipeError:
            pass
        line = self._out.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"event": "failed", "problem": "the process ended"}
        problem = answer.get("problem", "")
        seconds = round(time.monotonic() - began, 6)
        self._scene.calls.append(Call(self._child.pid, step, 1 if problem else 0, problem, seconds))
        if answer["event"] == "failed":
            raise NotRun(f"{step}: {problem}")
        return answer

    def connect(self, host: str, port: int) -> None:
        """A worker that was just started refuses device objects at first."""
        deadline = time.monotonic() + _CONNECT_SECONDS
        while True:
            try:
                self.ask("connect", host=host, port=port)
            except NotRun:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1.0)
            else:
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.kill()
        self._child.wait()
