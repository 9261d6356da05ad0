"""A real etcd on free ports of 127.0.0.1; it is in Debian's package etcd-server."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from support.datasystem_worker import free_ports

START_SECONDS = 60


class EtcdServer:
    """One server, with its files in a directory of its own. Skips the test where there is no etcd."""

    def __init__(self) -> None:
        program = shutil.which("etcd")
        if program is None:
            pytest.skip("etcd is not installed (apt-get install etcd-server)")
        self.directory = Path(tempfile.mkdtemp(prefix="etcd-"))
        self.port, peer_port = free_ports(2)
        client, peer = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{peer_port}"
        self.log = self.directory / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    program,
                    f"--data-dir={self.directory / 'data'}",
                    f"--listen-client-urls={client}",
                    f"--advertise-client-urls={client}",
                    f"--listen-peer-urls={peer}",
                    f"--initial-advertise-peer-urls={peer}",
                    f"--initial-cluster=default={peer}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def address(self) -> str:
        """Of its clients' port."""
        return f"127.0.0.1:{self.port}"

    def wait(self) -> EtcdServer:
        """Until it listens, which it does when it serves."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                running = self.process.poll() is None and time.monotonic() < deadline
                assert running, f"etcd does not start:\n{self.log.read_text()[-2000:]}"
                time.sleep(0.1)
            else:
                return self

    def close(self) -> None:
        """Ends it and removes its files."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)
