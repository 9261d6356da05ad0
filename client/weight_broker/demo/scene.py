"""Where a demo takes place: a temporary directory and processes. Nothing remains, however the demo ends."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Self

from weight_broker.cli import failure
from weight_broker.demo.process import Process
from weight_broker.runtime_directory import MAXIMUM_SOCKET_PATH_BYTES

_LONGEST_SOCKET_NAME = len("/weight-broker-demo-12345678/run/broker.sock")


class Scene:
    """A directory and processes, the broker first; leaving the block stops all of them."""

    def __init__(self) -> None:
        self.processes: list[Process] = []
        self.directory = Path()
        self.runtime_directory = Path()

    def __enter__(self) -> Self:
        base = tempfile.gettempdir()
        if len(os.fsencode(base)) + _LONGEST_SOCKET_NAME > MAXIMUM_SOCKET_PATH_BYTES:
            base = "/tmp"
        with failure.held():
            self.directory = Path(tempfile.mkdtemp(prefix="weight-broker-demo-", dir=base))
        self.runtime_directory = self.directory / "run"
        return self

    def __exit__(self, *_: object) -> None:
        with failure.uninterrupted():
            # Instances first: they leave the broker in order.
            for group in (self.processes[1:], self.processes[:1]):
                for process in group:
                    process.ask_to_stop()
                for process in group:
                    process.stop()
            shutil.rmtree(self.directory, ignore_errors=True)
