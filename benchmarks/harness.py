"""What a benchmark runs against: a broker and instances. All are real processes, and all of them end with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import grpc

from weight_broker import BrokerClient
from weight_broker.v1 import inspection_service_pb2 as inspection
from weight_broker.v1 import resources_pb2
from weight_broker.v1.inspection_service_pb2_grpc import InspectionServiceStub

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")

START_SECONDS = 60.0
MESSAGE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asked for."""

    size_bytes: int
    """Size of a weight set, where the question does not fix it."""
    checkpoint_directory: Path
    """A directory on a disk, for checkpoints."""
    rounds: int
    """Rounds of the expensive measurements."""


class Broker:
    """A daemon that is ready, with a runtime directory of its own."""

    def __init__(self, **settings: str) -> None:
        """`settings` are environment variables. Returns once the daemon has said READY=1."""
        self.directory = Path(tempfile.mkdtemp(prefix="weight-broker-benchmark-"))
        self._log = self.directory / "log"
        self._channel: grpc.Channel | None = None
        environment = {name: value for name, value in os.environ.items() if not name.startswith("WEIGHT_BROKER_")}
        environment |= {"WEIGHT_BROKER_RUNTIME_DIRECTORY": str(self.runtime_directory), **settings}
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifications, self._log.open("wb") as log:
            notifications.bind(str(self.directory / "notify"))
            notifications.settimeout(START_SECONDS)
            environment["NOTIFY_SOCKET"] = str(self.directory / "notify")
            begun = time.perf_counter()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "weight_brokerd"], env=environment, stdin=subprocess.DEVNULL, stderr=log
            )
            try:
                while b"READY=1" not in notifications.recv(4096):
                    pass
            except TimeoutError:
                text = self._log.read_text()
                self.close()
                raise RuntimeError(f"the daemon is not ready after {START_SECONDS} s:\n{text}") from None
            self.ready_seconds = time.perf_counter() - begun

    @property
    def runtime_directory(self) -> Path:
        """Where the sockets are."""
        return self.directory / "run"

    @property
    def inspection(self) -> InspectionServiceStub:
        """What operators call."""
        if self._channel is None:
            self._channel = grpc.insecure_channel(
                f"unix:{self.runtime_directory / 'broker.sock'}",
                options=[("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", MESSAGE_BYTES)],
            )
        return InspectionServiceStub(self._channel)

    def host(self) -> resources_pb2.Host:
        """What the broker says of itself."""
        return self.inspection.GetHost(inspection.GetHostRequest(), timeout=10).host

    def processor_seconds(self) -> float:
        """Processor time that the daemon has used."""
        return processor_seconds(self.process.pid)

    def resident_bytes(self) -> int:
        """The daemon's resident memory."""
        return resident_bytes(self.process.pid)

    def close(self) -> None:
        """Ends the daemon and removes its directory."""
        if self._channel is not None:
            self._channel.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


@contextlib.contextmanager
def running_broker(**settings: str) -> Iterator[Broker]:
    """A broker for the length of a block."""
    broker = Broker(**settings)
    try:
        yield broker
    finally:
        broker.close()


@dataclass(slots=True)
class Instance:
    """What an instance process keeps from one call to the next."""

    client: BrokerClient
    runtime_directory: Path
    kept: dict[str, Any] = field(default_factory=dict)


class InstanceProcess:
    """A process that does what it is told, one call after the other. It ends when this end of the pipe closes."""

    def __init__(self, broker: Broker, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, broker.runtime_directory, name), name=name, daemon=True
        )
        self.process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self.process.pid is not None
        return self.process.pid

    def begin(
        self,
        action: Callable[Concatenate[Instance, Arguments], Answer],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> None:
        """Starts a module-level function there; `result` waits for it."""
        self._connection.send((action, args, kwargs))

    def result(self) -> Any:
        """What the function returned."""
        answer, failure = self._connection.recv()
        if failure:
            raise RuntimeError(f"{self.process.name} failed:\n{failure}")
        return answer

    def call(
        self,
        action: Callable[Concatenate[Instance, Arguments], Answer],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Answer:
        """Runs a function there and waits."""
        self.begin(action, *args, **kwargs)
        answer: Answer = self.result()
        return answer

    def kill(self) -> None:
        """kill -9."""
        os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Ends it."""
        self._connection.close()
        if self.process.is_alive():
            self.process.kill()
        self.process.join()


@contextlib.contextmanager
def running_instances(broker: Broker, count: int, name: str = "instance") -> Iterator[list[InstanceProcess]]:
    """Instance processes for the length of a block."""
    with contextlib.ExitStack() as stack:
        instances = []
        for index in range(count):
            instances.append(InstanceProcess(broker, f"{name}-{index}"))
            stack.callback(instances[-1].close)
        yield instances


def _serve(connection: Connection, runtime_directory: Path, name: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with the pipe
    instance = Instance(BrokerClient(runtime_directory, name=name), runtime_directory)
    while True:
        try:
            action, args, kwargs = connection.recv()
        except EOFError:
            return
        try:
            connection.send((action(instance, *args, **kwargs), ""))
        except Exception:  # noqa: BLE001  # whatever it is, the benchmark is to show it
            connection.send((None, traceback.format_exc()))


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def processor_seconds(pid: int) -> float:
    """Processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def available_memory_bytes() -> int:
    """What the host has left."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def machine_facts() -> dict[str, object]:
    """What the numbers were measured on."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processors": len(os.sched_getaffinity(0)),
        "processor_model": models[0] if models else "unknown",
        "memory_available_bytes": available_memory_bytes(),
        "kernel": os.uname().release,
        "load_average": round(os.getloadavg()[0], 2),
    }
