"""Ranks of SGLang engines, run by a test."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.sglang_rank import MARK

START_SECONDS = 300.0
_TESTS = Path(__file__).parents[1]


@dataclass
class RankProcess:
    """One rank: what it was told to do, and what came of it."""

    runtime_directory: Path
    options: dict[str, Any]
    process: subprocess.Popen[bytes] | None = None
    _log: Any = None
    _heard: int = field(default=0)

    def start(self) -> RankProcess:
        """Starts it."""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # read when the rank has ended
        self.process = subprocess.Popen(
            [sys.executable, "-m", "support.sglang_rank", json.dumps(self.options)],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(_TESTS), str(_TESTS / "doubles/sglang_kernels")]),
                "WEIGHT_BROKER_RUNTIME_DIRECTORY": str(self.runtime_directory),
                "HF_HUB_OFFLINE": "1",
                "SGLANG_USE_CPU_ENGINE": "1",
                "SGLANG_NCCL_SO_PATH": "/nonexistent",  # a build of torch for CUDA has it, and it takes no processors
            },
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        return self

    @property
    def log(self) -> str:
        """What it has printed so far."""
        self._log.seek(0)
        return str(self._log.read().decode(errors="replace"))

    def result(self, timeout: float = START_SECONDS) -> dict[str, Any]:
        """The next thing that it has found out; waits for that."""
        assert self.process is not None
        deadline = time.monotonic() + timeout
        while True:
            ended = self.process.poll() is not None
            lines = [line for line in self.log.splitlines() if line.startswith(MARK)]
            if len(lines) > self._heard:
                found: dict[str, Any] = json.loads(lines[self._heard].removeprefix(MARK))
                self._heard += 1
                return found
            assert not ended, f"the rank ended with {self.process.returncode}:\n{self.log[-6000:]}"
            assert time.monotonic() < deadline, f"the rank does not answer:\n{self.log[-6000:]}"
            time.sleep(0.1)

    def do(self, action: str) -> dict[str, Any]:
        """Has it do something, and returns how it is then."""
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(f"{action}\n".encode())
        self.process.stdin.flush()
        return self.result()

    def failure(self, timeout: float = START_SECONDS) -> str:
        """What it printed before it ended with an error."""
        assert self.process is not None
        assert self.process.wait(timeout) != 0, self.log[-6000:]
        return self.log

    def close(self) -> None:
        """Ends it."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            self.process.wait()
        if self._log is not None:
            self._log.close()
