"""A real datasystem worker of the wheel in this environment, which is its own metastore, on free ports of 127.0.0.1."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

DISTRIBUTION = "openyuanrong-datasystem"
VERSION = "0.8.1"
START_SECONDS = 60


def require_wheel() -> None:
    """Skips the test, with the reason, where the wheel cannot be used."""
    try:
        version = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
        pytest.skip(
            f"{DISTRIBUTION} is not installed in {sys.prefix} (pip install {DISTRIBUTION}=={VERSION}; {python})"
        )
    if version != VERSION:
        pytest.skip(f"{DISTRIBUTION} {version} is installed, these tests are for {VERSION}")


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on; below the range that the kernel gives to clients."""
    found: list[int] = []
    with ExitStack() as stack:
        for port in range(20_000 + os.getpid() % 8_000, 32_000):
            candidate = stack.enter_context(socket.socket())
            try:
                candidate.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
            if len(found) == number:
                return found
    raise AssertionError("no free ports")


class DatasystemWorker:
    """One worker. Its files are in a short directory of its own, because it has sockets there."""

    def __init__(
        self,
        *,
        shared_memory_mb: int = 512,
        client_dead_timeout_s: int = 5,
        etcd: str = "",
        is_confined: bool = True,
        **flags: str,
    ) -> None:
        """`etcd`: the address of one that makes a cluster of its workers; otherwise the worker is its own metastore.
        `is_confined`: to one processor, because it has a busy loop for each device client: on two processors nobody
        else would get on, and clients would be taken for dead."""
        self._is_confined = is_confined
        self.directory = Path(tempfile.mkdtemp(prefix="ds-"))
        self.port, self.metastore_port = free_ports(2)
        own_metastore = {
            "metastore_address": f"127.0.0.1:{self.metastore_port}",
            "start_metastore_service": "true",
        }
        self.flags = {
            "worker_address": f"127.0.0.1:{self.port}",
            **({"etcd_address": etcd} if etcd else own_metastore),
            "shared_memory_size_mb": str(shared_memory_mb),
            "oc_thread_num": "8",
            "client_dead_timeout_s": str(client_dead_timeout_s),
            **flags,
        }
        self.pid = 0

    def start(self) -> DatasystemWorker:
        """Starts it with the wheel's own dscli, which returns when it is ready."""
        dscli = Path(sysconfig.get_path("scripts")) / "dscli"
        arguments = [text for flag, value in self.flags.items() for text in (f"--{flag}", value)]
        # Without the double: a worker has no device, and with the preload it would look for one.
        environment = {
            name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "LD_LIBRARY_PATH")
        }
        started = subprocess.run(
            [dscli, "start", "-d", self.directory, "-w", *arguments],
            cwd=self.directory,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=START_SECONDS,
        )
        found = re.search(r"success, PID: (\d+)", started.stdout)
        assert found, f"dscli start ended with {started.returncode}:\n{started.stdout}\n{self._logs()}"
        self.pid = int(found[1])
        if self._is_confined:
            last = {max(os.sched_getaffinity(0))}
            for thread in Path(f"/proc/{self.pid}/task").iterdir():
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(int(thread.name), last)
        return self

    def kill(self) -> None:
        """kill -9."""
        self._signal(signal.SIGKILL)
        self._wait(10)

    def close(self) -> None:
        """Ends it, politely first, and removes its files."""
        if self.pid:
            self._signal(signal.SIGTERM)
            if not self._wait(5):
                self.kill()  # a worker with a wedged directory ignores SIGTERM
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def is_running(self) -> bool:
        """Whether its process is there."""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        return state not in "ZX"

    def _signal(self, number: signal.Signals) -> None:
        if self.pid and self.is_running:
            os.kill(self.pid, number)

    def _wait(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.is_running and time.monotonic() < deadline:
            time.sleep(0.05)
        return not self.is_running

    def _logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in self.directory.rglob("*.log"))
