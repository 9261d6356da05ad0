"""A real broker daemon, run by a test and killed by its pid."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc

from weight_broker.v1 import inspection_service_pb2 as inspection
from weight_broker.v1 import resources_pb2
from weight_broker.v1.inspection_service_pb2_grpc import InspectionServiceStub


class BrokerProcess:
    """`python -m weight_brokerd` with a runtime directory of its own."""

    def __init__(self, runtime_directory: Path, **environment: str) -> None:
        self.runtime_directory = runtime_directory
        self.environment = environment
        self.log_path = runtime_directory.parent / f"{runtime_directory.name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._channel: grpc.Channel | None = None

    @property
    def socket_path(self) -> Path:
        """The gRPC socket."""
        return self.runtime_directory / "broker.sock"

    @property
    def pid(self) -> int:
        """The daemon's pid."""
        assert self.process is not None
        return self.process.pid

    @property
    def log(self) -> str:
        """What the daemon has logged."""
        return self.log_path.read_text() if self.log_path.exists() else ""

    def start(self, *, wait_seconds: float = 60.0) -> BrokerProcess:
        """Starts the daemon and waits until its attach socket accepts."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("WEIGHT_BROKER_")}
        environment |= {"WEIGHT_BROKER_RUNTIME_DIRECTORY": str(self.runtime_directory), **self.environment}
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "weight_brokerd"], env=environment, stdin=subprocess.DEVNULL, stderr=log
            )
        deadline = time.monotonic() + wait_seconds
        while not self.is_accepting():
            assert self.process.poll() is None, f"the broker ended with {self.process.returncode}:\n{self.log}"
            assert time.monotonic() < deadline, f"the broker is not ready:\n{self.log}"
            time.sleep(0.02)
        return self

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self._close_channel()

    def terminate(self, timeout: float = 60.0) -> int:
        """SIGTERM; returns the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(timeout)
        self._close_channel()
        return status

    def close(self) -> None:
        """Ends the daemon if it still runs."""
        self._close_channel()
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    @property
    def channel(self) -> grpc.Channel:
        """A channel to it."""
        if self._channel is None:
            self._channel = grpc.insecure_channel(
                f"unix:{self.socket_path}", options=[("grpc.use_local_subchannel_pool", 1)]
            )
        return self._channel

    @property
    def inspection(self) -> InspectionServiceStub:
        """The inspection service."""
        return InspectionServiceStub(self.channel)

    def host(self) -> resources_pb2.Host:
        """What GetHost says."""
        return self.inspection.GetHost(inspection.GetHostRequest(), timeout=60).host

    def publications(self) -> list[resources_pb2.Publication]:
        """All publications of all weight sets."""
        listed = self.inspection.ListWeightSets(inspection.ListWeightSetsRequest(page_size=1000), timeout=60)
        return [publication for weight_set in listed.weight_sets for publication in weight_set.publications]

    def instances(self) -> list[resources_pb2.Instance]:
        """All instances."""
        return list(
            self.inspection.ListInstances(inspection.ListInstancesRequest(page_size=1000), timeout=60).instances
        )

    def transfers(self) -> list[resources_pb2.Transfer]:
        """All transfers that are remembered, newest first."""
        return list(
            self.inspection.ListTransfers(inspection.ListTransfersRequest(page_size=1000), timeout=60).transfers
        )

    def descriptors(self) -> list[str]:
        """What the daemon has open, one line each."""
        directory = Path(f"/proc/{self.pid}/fd")
        found = []
        for entry in directory.iterdir():
            try:
                found.append(os.readlink(entry))
            except FileNotFoundError:
                continue
        return sorted(found)

    def memfds(self) -> int:
        """How many memfds the daemon has open or mapped."""
        mapped = Path(f"/proc/{self.pid}/maps").read_text().count("/memfd:")
        return mapped + sum(1 for line in self.descriptors() if line.startswith("/memfd:"))

    def is_accepting(self) -> bool:
        """Whether its attach socket accepts connections."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            try:
                probe.connect(str(self.runtime_directory / "attach.sock"))
            except OSError:
                return False
            return True

    def _close_channel(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
