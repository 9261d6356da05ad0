"""A process that takes what it can get: `python -m benchmarks.flooder RUNTIME_DIRECTORY FLOOD`.

It prints `flooding` once the flood is in force, and goes on until its standard input ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import resource
import select
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

from weight_broker.key import WeightSetKey
from weight_broker.layout import Layout, TensorSpec
from weight_broker.v1 import attach_pb2 as attach
from weight_broker.v1 import inspection_service_pb2 as inspection
from weight_broker.v1 import resources_pb2, weight_set_pb2
from weight_broker.v1 import weight_broker_service_pb2 as service
from weight_broker.v1.inspection_service_pb2_grpc import InspectionServiceStub
from weight_broker.v1.weight_broker_service_pb2_grpc import WeightBrokerServiceStub
from weight_broker.wire import TOKEN_METADATA_KEY, key_to_wire, layout_to_wire

_LAYOUT = Layout([TensorSpec("weight", "int8", (8,), (1,), 8)])
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_PAUSE_SECONDS = 0.01
"""After a refusal on the attach socket: a flood that does nothing but compute measures the processor."""


class Flooder:
    """One hostile process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.kept: list[socket.socket] = []
        self.refused = 0

    def connect(self) -> socket.socket:
        """A connection to the attach socket that has said nothing yet."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(str(self.directory / "attach.sock"))
        return connection

    def attach(self) -> tuple[socket.socket, attach.Welcome] | None:
        """An instance; None if it was refused."""
        connection = self.connect()
        hello = attach.Hello(protocol_version=1, name="flood", client_version="1")
        answer = ask(connection, attach.AttachRequest(hello=hello))
        if answer is None or not answer.HasField("welcome"):
            connection.close()
            self.refused += 1
            return None
        return connection, answer.welcome

    def channel(self) -> grpc.aio.Channel:
        """A connection to the gRPC socket, shared with nothing."""
        options = [("grpc.use_local_subchannel_pool", 1)]
        return grpc.aio.insecure_channel(f"unix:{self.directory / 'broker.sock'}", options=options)

    def metadata(self) -> tuple[tuple[str, bytes], ...]:
        """Of a new instance."""
        found = self.attach()
        assert found is not None, "the first instance of a process is not refused"
        connection, welcome = found
        self.kept.append(connection)
        return ((TOKEN_METADATA_KEY, welcome.session_token),)


def ask(connection: socket.socket, request: attach.AttachRequest, *descriptors: int) -> attach.AttachResponse | None:
    """The answer; None if the broker hung up."""
    try:
        socket.send_fds(connection, [request.SerializeToString()], descriptors)
        answer = connection.recv(1 << 16)
    except OSError:
        return None
    return attach.AttachResponse.FromString(answer) if answer else None


async def instances(flooder: Flooder, ready: Callable[[], None]) -> None:
    """Every slot for an instance, and what becomes free later."""
    while True:
        found = flooder.attach()
        if found is not None:
            flooder.kept.append(found[0])
        if found is None or len(flooder.kept) > 4096:
            ready()
            await asyncio.sleep(_PAUSE_SECONDS)


async def regions(flooder: Flooder, ready: Callable[[], None]) -> None:
    """1,024 regions from each of 64 connections, and what becomes free later."""
    memory = os.memfd_create("flood", os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, 4096)
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
    while True:
        for _ in range(64):
            found = flooder.attach()
            if found is None:
                break
            flooder.kept.append(found[0])
            for number in range(1024):
                offer = attach.OfferRegion(region_id=str(number), size_bytes=4096)
                answer = ask(found[0], attach.AttachRequest(offer_region=offer), memory)
                if answer is None or not answer.HasField("accepted"):
                    flooder.refused += 1
                    break
        ready()
        await asyncio.sleep(_PAUSE_SECONDS)


async def packets(flooder: Flooder, ready: Callable[[], None]) -> None:
    """Requests on the attach socket without end, from 32 connections."""
    connections = [found[0] for _ in range(32) if (found := flooder.attach()) is not None]
    request = attach.AttachRequest(withdraw_region=attach.WithdrawRegion(region_id="none"))
    packet = request.SerializeToString()
    ready()
    while True:
        for connection in connections:
            connection.send(packet)
        for connection in connections:
            connection.recv(1 << 16)


async def attachments(flooder: Flooder, ready: Callable[[], None]) -> None:
    """Instances that come and go without end."""
    ready()
    while True:
        found = flooder.attach()
        if found is not None:
            found[0].close()


async def strangers(flooder: Flooder, ready: Callable[[], None]) -> None:
    """Connections that say nothing, without end."""
    while True:
        with contextlib.suppress(OSError):
            flooder.kept.append(flooder.connect())
        if len(flooder.kept) > 500:
            ready()
            flooder.kept.pop(0).close()


async def strangers_to_grpc(flooder: Flooder, ready: Callable[[], None]) -> None:
    """The same on the gRPC socket."""
    while True:
        with contextlib.suppress(OSError):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            flooder.kept.append(connection)
            connection.connect(str(flooder.directory / "broker.sock"))
        if len(flooder.kept) > 500:
            ready()
            flooder.kept.pop(0).close()


async def acquires(flooder: Flooder, ready: Callable[[], None]) -> None:
    """10,000 Acquire calls that wait, opened again as soon as one ends."""
    metadata = flooder.metadata()
    stub: Any = WeightBrokerServiceStub(flooder.channel())
    request = service.AcquireRequest(
        key=key_to_wire(WeightSetKey("flood")),
        layout=layout_to_wire(_LAYOUT),
        if_absent=service.IF_ABSENT_LOAD,
        path=resources_pb2.TRANSFER_PATH_COPY,
        device_kind=weight_set_pb2.DEVICE_KIND_CPU,
        request_id="flood",
    )
    loader: Any = stub.Acquire(request, metadata=metadata)
    await loader.read()  # the lease: all others wait

    async def wait() -> None:
        async for _ in stub.Acquire(request, metadata=metadata):
            pass

    await _again_and_again(wait, 10_000, ready)


async def watches(flooder: Flooder, ready: Callable[[], None]) -> None:
    """1,000 Watch calls, opened again as soon as one ends."""
    metadata = flooder.metadata()
    stub: Any = InspectionServiceStub(flooder.channel())

    async def watch() -> None:
        async for _ in stub.Watch(inspection.WatchRequest(), metadata=metadata):
            pass

    await _again_and_again(watch, 1000, ready)


async def calls(flooder: Flooder, ready: Callable[[], None]) -> None:
    """GetHost without end, 64 calls at a time."""
    await _get_host(flooder, flooder.metadata(), ready)


async def calls_without_a_token(flooder: Flooder, ready: Callable[[], None]) -> None:
    """The same, by callers that have not attached."""
    await _get_host(flooder, (), ready)


async def half_calls(flooder: Flooder, ready: Callable[[], None]) -> None:
    """1,000 calls that never send their request, opened again as soon as one ends."""
    await _half_calls(flooder, flooder.metadata(), ready)


async def half_calls_without_a_token(flooder: Flooder, ready: Callable[[], None]) -> None:
    """The same, by callers that have not attached."""
    await _half_calls(flooder, (), ready)


async def connections(flooder: Flooder, ready: Callable[[], None]) -> None:
    """1,000 gRPC connections, each with a GetHost without end."""
    metadata = flooder.metadata()

    async def call(channel: grpc.aio.Channel) -> None:
        stub: Any = InspectionServiceStub(channel)
        await stub.GetHost(inspection.GetHostRequest(), metadata=metadata)

    channels = [flooder.channel() for _ in range(1000)]
    workers = [_again_and_again(lambda channel=channel: call(channel), 1, ready) for channel in channels]  # type: ignore[misc]
    await asyncio.gather(*workers)


async def _get_host(flooder: Flooder, metadata: Any, ready: Callable[[], None]) -> None:
    stub: Any = InspectionServiceStub(flooder.channel())

    async def call() -> None:
        await stub.GetHost(inspection.GetHostRequest(), metadata=metadata)

    await _again_and_again(call, 64, ready)


async def pings(flooder: Flooder, ready: Callable[[], None]) -> None:
    """HTTP/2 pings without end, over 32 gRPC connections."""
    ping = frame(6, bytes(8))
    write_without_end(flooder, ready, lambda _: 100 * ping)


async def resets(flooder: Flooder, ready: Callable[[], None]) -> None:
    """Calls that are cancelled at once, without end, over 32 gRPC connections."""

    def calls(first: int) -> bytes:
        streams = range(2 * first + 1, 2 * (first + 50) + 1, 2)
        reset = (8).to_bytes(4, "big")
        return b"".join(frame(1, GET_HOST_HEADERS, stream, flags=4) + frame(3, reset, stream) for stream in streams)

    write_without_end(flooder, ready, lambda round_: calls(50 * round_))


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, payload: bytes, stream: int = 0, flags: int = 0) -> bytes:
    """Of HTTP/2."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _literal(name: bytes, value: bytes) -> bytes:
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


GET_HOST_HEADERS = (
    b"\x83\x86"
    + _literal(b":path", b"/weight_broker.v1.InspectionService/GetHost")
    + _literal(b":authority", b"localhost")
    + _literal(b"content-type", b"application/grpc")
    + _literal(b"te", b"trailers")
)


class HttpConnection:
    """Writes rounds of frames as fast as the broker reads them, and reads what it answers."""

    def __init__(self, path: Path, frames: Callable[[int], bytes]) -> None:
        self._frames = frames
        self._round = 0
        self._unsent = PREFACE + frame(4, b"")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(str(path))
        self.socket.setblocking(False)

    def fileno(self) -> int:
        """Of the socket."""
        return self.socket.fileno()

    def read(self) -> None:
        """Raises `OSError` if the broker has closed the connection."""
        if not self.socket.recv(1 << 16):
            raise ConnectionResetError

    def write(self) -> None:
        """Raises `OSError` if the broker has closed the connection."""
        if not self._unsent:
            self._unsent = self._frames(self._round)
            self._round += 1
        self._unsent = self._unsent[self.socket.send(self._unsent) :]


def write_without_end(flooder: Flooder, ready: Callable[[], None], frames: Callable[[int], bytes]) -> None:
    """Over 32 connections; one that the broker closes is opened again."""
    path = flooder.directory / "broker.sock"
    connections = {HttpConnection(path, frames) for _ in range(32)}
    ready()
    while True:
        readable, writable, _ = select.select(connections, connections, [])
        for connection in {*readable, *writable}:
            try:
                if connection in readable:
                    connection.read()
                if connection in writable:
                    connection.write()
            except BlockingIOError:
                continue
            except OSError:
                connection.socket.close()
                connections.remove(connection)
                connections.add(HttpConnection(path, frames))


async def _half_calls(flooder: Flooder, metadata: Any, ready: Callable[[], None]) -> None:
    method: Any = flooder.channel().stream_unary("/weight_broker.v1.InspectionService/GetHost")

    async def never() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    async def call() -> None:
        await method(never(), metadata=metadata)

    await _again_and_again(call, 1000, ready)


async def _again_and_again(action: Callable[[], Awaitable[None]], at_once: int, ready: Callable[[], None]) -> None:
    async def repeat() -> None:
        while True:
            try:
                await action()
            except grpc.RpcError:
                await asyncio.sleep(0)

    tasks = [asyncio.create_task(repeat()) for _ in range(at_once)]
    await asyncio.sleep(1)
    ready()
    await asyncio.gather(*tasks)


FLOODS: dict[str, Callable[[Flooder, Callable[[], None]], Awaitable[None]]] = {
    flood.__name__: flood
    for flood in (
        instances,
        regions,
        packets,
        attachments,
        strangers,
        strangers_to_grpc,
        acquires,
        watches,
        calls,
        calls_without_a_token,
        half_calls,
        half_calls_without_a_token,
        connections,
        pings,
        resets,
    )
}


def main() -> None:
    """Floods until standard input ends."""
    directory, name = Path(sys.argv[1]), sys.argv[2]
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    said: list[None] = []

    def ready() -> None:
        if not said:
            said.append(None)
            print("flooding", flush=True)

    def end() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    import threading

    threading.Thread(target=end, daemon=True).start()
    asyncio.run(_run(FLOODS[name], Flooder(directory), ready))


async def _run(flood: Callable[..., Awaitable[None]], flooder: Flooder, ready: Callable[[], None]) -> None:
    await flood(flooder, ready)


if __name__ == "__main__":
    main()
