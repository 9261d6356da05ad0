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
import urllib.error
import urllib.request
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
    in_every_process: str = ""
    """What a test wants to be different in all of its processes."""
    port: int = 0
    """Where it serves HTTP, if it is to be vLLM's own server."""
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    _log: Any = None

    def start(self) -> EngineProcess:
        """Starts it, in a process group of its own."""
        tests = Path(__file__).parents[1]
        ranks = int(self.options.get("tensor_parallel_size", 1))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (tests, tests / "support/every_process"))),
            "TEST_EVERY_PROCESS": self.in_every_process,
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
            self._server() if self.port else [sys.executable, "-m", "support.vllm_engine", json.dumps(self.options)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return self

    def _server(self) -> list[str]:
        # Not `vllm serve`: that asks for a distribution of the name vllm, and the rebuild for processors has another.
        module = "vllm.entrypoints.openai.api_server"
        arguments = ["--host", "127.0.0.1", "--port", str(self.port), "--skip-tokenizer-init", "--enforce-eager"]
        arguments += ["--dtype", "bfloat16", "--max-model-len", "256", "--max-num-seqs", "4"]
        for name, value in self.options.items():
            arguments += [f"--{name.replace('_', '-')}", value if isinstance(value, str) else json.dumps(value)]
        return [sys.executable, "-m", module, *arguments]

    def ask(self, path: str, question: dict[str, Any] | None = None, timeout: float = START_SECONDS) -> Any:
        """Asks the server, once it answers."""
        assert self.process is not None
        content = json.dumps(question).encode() if question is not None else None
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", content, headers)
        deadline = time.monotonic() + timeout
        while True:
            try:
                with urllib.request.urlopen(request, timeout=timeout) as answer:
                    text = answer.read()
                    return json.loads(text) if text else None
            except urllib.error.HTTPError as error:
                raise AssertionError(f"{path}: {error}\n{self.log[-6000:]}") from error
            except OSError:
                assert self.process.poll() is None, self.log[-6000:]
                assert time.monotonic() < deadline, self.log[-6000:]
                time.sleep(0.2)

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
