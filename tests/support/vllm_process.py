"""Real vLLM engines, run by a test."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.vllm_engine import MARK

START_SECONDS = 900.0
"""Most of it is importing; on a busy machine that takes minutes."""


@dataclass
class EngineProcess:
    """One engine: what it was told to do, and what came of it."""

    runtime_directory: Path
    options: dict[str, Any]
    multiprocessing: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    _log: Any = None

    def start(self) -> EngineProcess:
        """Starts it, in a process group of its own."""
        ranks = int(self.options.get("tensor_parallel_size", 1))
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "WEIGHT_BROKER_RUNTIME_DIRECTORY": str(self.runtime_directory),
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if self.multiprocessing or ranks > 1 else "0",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "VLLM_ENGINE_BEGAN": str(time.time()),
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for the functions that tests run in workers
            **self.environment,
        }
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # read when the engine has ended
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "support.vllm_engine", json.dumps(self.options)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return self

    @property
    def log(self) -> str:
        """What it has printed so far."""
        self._log.seek(0)
        return str(self._log.read().decode(errors="replace"))

    def result(self, timeout: float = START_SECONDS) -> dict[str, Any]:
        """What it has found out; waits for that."""
        assert self.process is not None
        deadline = time.monotonic() + timeout
        while True:
            ended = self.process.poll() is not None
            for line in self.log.splitlines():
                if line.startswith(MARK):
                    found: dict[str, Any] = json.loads(line.removeprefix(MARK))
                    return found
            assert not ended, f"the engine ended with {self.process.returncode}:\n{self.log[-6000:]}"
            assert time.monotonic() < deadline, f"the engine does not answer:\n{self.log[-6000:]}"
            time.sleep(0.2)

    def failure(self, timeout: float = START_SECONDS) -> str:
        """What it printed before it ended with an error."""
        assert self.process is not None
        assert self.process.wait(timeout) != 0, self.log[-6000:]
        return self.log

    def close(self) -> None:
        """Ends it and its workers."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self._log is not None:
            self._log.close()
