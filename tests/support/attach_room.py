"""An attach server on a loop of its own, somebody to tell what happens there, and raw clients."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType

from weight_broker.errors import BrokerError
from weight_broker.v1 import attach_pb2 as pb
from weight_brokerd.attach.server import AttachServer, PeerCredentials, Session
from weight_brokerd.core.model import Process

HELLO = pb.AttachRequest(hello=pb.Hello(protocol_version=1, name="test", client_version="1"))
WITHDRAW = pb.AttachRequest(withdraw_region=pb.WithdrawRegion(region_id="region"))
GOODBYE = pb.AttachRequest(goodbye=pb.Goodbye())

CHILD = """
import os, socket, sys, time
from weight_broker.v1 import attach_pb2 as pb
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
s.connect(sys.argv[1])
s.send(pb.AttachRequest(hello=pb.Hello(protocol_version=1, name="child")).SerializeToString())
s.recv(4096)
if sys.argv[2] == "fork" and os.fork() == 0:
    print(os.getpid(), flush=True)
    time.sleep(60)
    os._exit(0)
if sys.argv[2] == "close":
    s.close()
if sys.argv[2] != "fork":
    print("attached", flush=True)
time.sleep(60)
"""


class RecordingAttendance:
    """Takes everything and writes it down; `error` is raised instead if it is set."""

    def __init__(self) -> None:
        self.peers: list[PeerCredentials] = []
        self.events: list[tuple[str, ...]] = []
        self.contents: list[bytes] = []
        self.lent = -1
        self.error: Exception | None = None

    def attach(self, peer: PeerCredentials, name: str, client_version: str) -> Session:
        self._fail()
        self.peers.append(peer)
        self.events.append(("attach", name, client_version))
        return Session(f"instance-{len(self.peers)}", bytes([len(self.peers) % 256]) * 32, peer)

    def disconnected(self, instance_id: str) -> None:
        self.events.append(("disconnected", instance_id))
        self._fail()

    def departed(self, instance_id: str, reason: str) -> None:
        self.events.append(("departed", instance_id, reason))
        self._fail()

    def offer_region(self, instance_id: str, region_id: str, size_bytes: int, fd: int) -> None:
        try:
            self._fail()
            self.contents.append(os.pread(fd, size_bytes, 0))
            self.events.append(("offer", instance_id, region_id))
        finally:
            os.close(fd)

    def withdraw_region(self, instance_id: str, region_id: str) -> None:
        self._fail()
        self.events.append(("withdraw", instance_id, region_id))

    def claim_region(self, instance_id: str, transfer_id: str, region_index: int) -> int:
        self._fail()
        self.events.append(("claim", instance_id, transfer_id, str(region_index)))
        return self.lent

    def stage_owner(self, token: bytes, peer: PeerCredentials) -> str:
        self._fail()
        self.events.append(("stage", token.hex()[:2]))
        return "instance-1"

    def stage_connected(self, instance_id: str, connection: socket.socket) -> None:
        self.events.append(("stage connected", instance_id))
        connection.close()

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error

    def refuse(self, error: BrokerError) -> None:
        """From now on everything is refused with this."""
        self.error = error


class RecordingEntrances:
    """Lends `way` for every process."""

    def __init__(self) -> None:
        self.open_for: dict[str, Process] = {}
        self.way = -1
        self.error: OSError | None = None

    def open(self, instance_id: str, process: Process) -> int:
        if self.error is not None:
            raise self.error
        self.open_for[instance_id] = process
        return self.way

    def close(self, instance_id: str) -> None:
        self.open_for.pop(instance_id, None)


class AttachRoom:
    """The server, in a thread, and who it tells."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.attendance = RecordingAttendance()
        self.entrances = RecordingEntrances()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self.server = asyncio.run_coroutine_threadsafe(self._open(), self.loop).result(60)

    async def _open(self) -> AttachServer:
        server = AttachServer(self.attendance, host_id="host-1", broker_version="1.2.3", entrances=self.entrances)
        server.open(self.path)
        return server

    def close(self) -> None:
        async def close() -> None:
            self.server.close()

        asyncio.run_coroutine_threadsafe(close(), self.loop).result(60)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def turn(self) -> None:
        """Returns when the server's loop has looked at everything that there was to look at."""

        async def turn() -> None:
            await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(turn(), self.loop).result(60)

    def client(self) -> RawClient:
        """A connection that has said nothing yet."""
        return RawClient(self.path)

    def instance(self) -> RawClient:
        """A connection that has said Hello."""
        client = RawClient(self.path)
        assert client.ask(HELLO).HasField("welcome")
        return client

    def child(self, behaviour: str = "stay") -> subprocess.Popen[str]:
        """A process that attaches; its first line is printed once that is done."""
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, str(self.path), behaviour], stdout=subprocess.PIPE, text=True
        )


class RawClient:
    """Sends what it is told, also what makes no sense."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(60)
        self.socket.connect(str(path))

    def __enter__(self) -> RawClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, packet: pb.AttachRequest | bytes, descriptors: tuple[int, ...] = ()) -> None:
        data = packet if isinstance(packet, bytes) else packet.SerializeToString()
        socket.send_fds(self.socket, [data], descriptors)

    def receive(self) -> tuple[pb.AttachResponse, list[int]]:
        data, descriptors, _, _ = socket.recv_fds(self.socket, 65536, 4)
        assert data, "the broker closed the connection"
        return pb.AttachResponse.FromString(data), descriptors

    def ask(self, packet: pb.AttachRequest | bytes, descriptors: tuple[int, ...] = ()) -> pb.AttachResponse:
        self.send(packet, descriptors)
        response, received = self.receive()
        assert not received
        return response

    def closed_by_broker(self) -> bool:
        """Whether the broker closed the connection; waits for it."""
        try:
            return self.socket.recv(65536) == b""
        except ConnectionResetError:
            return True
