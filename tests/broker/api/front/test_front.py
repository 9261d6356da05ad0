"""The gRPC socket's front: whose a connection is, how many there are, and the bytes in between."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from support.sealed_memory import open_descriptors
from weight_brokerd.api.front import allowances
from weight_brokerd.api.front.front import Front
from weight_brokerd.attach import acceptor
from weight_brokerd.core.conduct.pace import Pace
from weight_brokerd.core.model import Process

ME = Process(os.getuid(), str(os.getpid()))
MUCH = os.urandom(1 << 20) * 8
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Room:
    """A front before a server that the test plays."""

    def __init__(self, path: Path, front: Front) -> None:
        self.path = path
        self.front = front
        self.peers: list[str] = []
        """What the server sees of its connections."""

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(self.path)


@contextlib.asynccontextmanager
async def opened(directory: Path, serve: Serve, *, per_process: int = 8, total: int = 100) -> AsyncIterator[Room]:
    """All descriptors are given back at the end."""
    before = open_descriptors(("socket:",))
    room = Room(directory / "front.sock", Front(directory, per_process=per_process, total=total))
    running: set[asyncio.Task[None]] = set()

    async def serving(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        running.add(asyncio.current_task())  # type: ignore[arg-type]
        room.peers.append("unix-abstract:" + writer.get_extra_info("peername")[1:].decode())
        with contextlib.suppress(ConnectionError):
            await serve(reader, writer)
        writer.close()

    server = await asyncio.start_unix_server(serving, directory / "server.sock")
    room.front.hide(directory / "server.sock")
    room.front.open(room.path)
    try:
        yield room
    finally:
        await room.front.close(0.01)
        server.close()
        await asyncio.gather(*running, return_exceptions=True)
        await asyncio.sleep(0.01)
    assert open_descriptors(("socket:",)) == before, "a descriptor leaked"


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while content := await reader.read(1 << 16):
        writer.write(content)
        await writer.drain()


def run(scenario: Awaitable[None]) -> None:
    async def begin() -> None:
        await asyncio.wait_for(scenario, 60)

    asyncio.run(begin())


async def ends(reader: asyncio.StreamReader) -> bytes:
    """What comes before the end of a connection."""
    try:
        return await reader.read()
    except ConnectionError:
        return b""


def test_a_connection_is_known_by_the_process_that_the_kernel_attests(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path, echo) as room:
            reader, writer = await room.connect()
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            [peer] = room.peers
            assert room.front.process_of(peer) == ME
            assert room.front.process_of(peer + "0") is None
            assert room.front.process_of("unix:") is None
            writer.close()
            await ends(reader)
            await _until_served(room)
            assert room.front.process_of(peer) is None

    run(scenario())


def test_the_server_cannot_be_found_beside_its_front(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path, echo):
            assert os.listdir(tmp_path) == ["front.sock"]

    run(scenario())


def test_all_bytes_arrive_in_order_although_both_ends_are_slow(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path, echo) as room:
            reader, writer = await room.connect()
            sending = asyncio.create_task(_send(writer, MUCH))
            received = bytearray()
            while len(received) < len(MUCH):
                received += await reader.read(50_000)
                await asyncio.sleep(0)
            await sending
            assert bytes(received) == MUCH
            writer.close()

    run(scenario())


def test_what_a_process_sends_beyond_its_allowance_arrives_later_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allowances, "FRAME_PACE", Pace(per_second=200, burst=1))
    waits: list[float] = []
    wait = allowances.Allowances.wait

    def watched(self: allowances.Allowances, process: Process) -> float:
        waits.append(wait(self, process))
        return waits[-1]

    monkeypatch.setattr(allowances.Allowances, "wait", watched)

    async def scenario() -> None:
        async with opened(tmp_path, echo) as room:
            reader, writer = await room.connect()
            received = b""
            for number in range(20):
                writer.write(b"%02d" % number)
                received += await reader.readexactly(2)
            assert received == b"".join(b"%02d" % number for number in range(20))
            writer.close()
            assert any(seconds > 0 for seconds in waits)

    run(scenario())


def test_one_client_that_does_not_read_keeps_no_other_waiting(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path, echo) as room:
            _, deaf = await room.connect()
            flood = asyncio.create_task(_send(deaf, MUCH))
            for _ in range(3):
                reader, writer = await room.connect()
                writer.write(b"hello")
                assert await reader.readexactly(5) == b"hello"
                writer.close()
            assert not flood.done()
            flood.cancel()
            deaf.transport.abort()
            await asyncio.gather(flood, return_exceptions=True)

    run(scenario())


def test_what_the_server_wrote_before_it_closed_reaches_the_client(tmp_path: Path) -> None:
    async def last_words(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _send(writer, MUCH)

    async def scenario() -> None:
        async with opened(tmp_path, last_words) as room:
            reader, writer = await room.connect()
            writer.write(b"nobody reads this")
            assert await ends(reader) == MUCH
            writer.close()

    run(scenario())


def test_the_end_of_a_client_is_the_end_of_its_connection_to_the_server(tmp_path: Path) -> None:
    ended = asyncio.Event()

    async def wait(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await ends(reader)
        ended.set()

    async def scenario() -> None:
        async with opened(tmp_path, wait) as room:
            _, writer = await room.connect()
            writer.write(b"hello")
            writer.close()
            await ended.wait()

    run(scenario())


def test_a_process_has_a_bounded_number_of_connections_and_may_replace_one_that_ended(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path, echo, per_process=1) as room:
            first, second, third = [await room.connect() for _ in range(3)]
            assert await ends(third[0]) == b""
            for reader, writer in (first, second):
                writer.write(b"hello")
                assert await reader.readexactly(5) == b"hello"
            first[1].close()
            await ends(first[0])
            await _until_served(room)
            for _, writer in (second, third):
                writer.close()

    run(scenario())


def test_a_process_that_connects_too_often_is_refused_before_the_server_hears_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptor, "CONNECTION_PACE", Pace(per_second=1e-6, burst=3))

    async def scenario() -> None:
        async with opened(tmp_path, echo) as room:
            for _ in range(20):
                reader, writer = await room.connect()
                writer.close()
                await ends(reader)
            assert len(room.peers) <= 3

    run(scenario())


def test_the_socket_of_a_process_has_no_path_and_lets_that_process_in_until_it_is_closed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path, echo) as room:
            way = os.dup(room.front.entrances.open("instance-1", ME))
            path = f"/proc/self/fd/{way}"
            assert os.listdir(tmp_path) == ["front.sock"]
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            assert room.front.process_of(room.peers[0]) == ME
            room.front.entrances.close("instance-1")
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_unix_connection(path)
            writer.write(b"again")
            assert await reader.readexactly(5) == b"again", "a connection outlives the socket that it came through"
            writer.close()
            os.close(way)

    run(scenario())


@pytest.mark.parametrize("owner", [ME, Process(ME.uid + 1, ME.name)])
def test_a_process_that_has_changed_its_user_still_enters_by_its_socket(tmp_path: Path, owner: Process) -> None:
    async def scenario() -> None:
        async with opened(tmp_path, echo) as room:
            assert await _entered(room, owner) == owner

    run(scenario())


def test_a_process_whose_pid_the_broker_does_not_see_enters_by_its_socket_as_one_of_its_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = itertools.count()

    def unseen(_: socket.socket) -> Process:
        return Process(ME.uid, f"connection {next(numbers)}")

    monkeypatch.setattr(acceptor, "process_of", unseen)

    async def scenario() -> None:
        async with opened(tmp_path, echo) as room:
            owner = Process(ME.uid, "connection of the attach socket")
            assert await _entered(room, owner) == owner
            assert await _entered(room, Process(ME.uid + 1, "connection of another user")) is None

    run(scenario())


def test_no_other_process_enters_by_the_socket_of_a_process(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path, echo) as room:
            way = os.dup(room.front.entrances.open("instance-1", Process(ME.uid, "1")))
            reader, writer = await asyncio.open_unix_connection(f"/proc/self/fd/{way}")
            assert await ends(reader) == b""
            assert room.peers == []
            writer.close()
            os.close(way)

    run(scenario())


def test_a_server_that_is_gone_costs_a_client_its_connection_and_the_front_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        front = Front(tmp_path, per_process=8, total=8)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "server.sock"))
            listener.listen()
            front.hide(tmp_path / "server.sock")
        front.open(tmp_path / "front.sock")
        for _ in range(2):
            reader, writer = await asyncio.open_unix_connection(tmp_path / "front.sock")
            assert await ends(reader) == b""
            writer.close()
        await front.close(0.01)

    run(scenario())


async def _entered(room: Room, owner: Process) -> Process | None:
    """Whom this process is counted for if it connects to the socket of `owner`; None if it is not let in."""
    way = os.dup(room.front.entrances.open(owner.name, owner))
    reader, writer = await asyncio.open_unix_connection(f"/proc/self/fd/{way}")
    os.close(way)
    with contextlib.suppress(ConnectionError):
        writer.write(b"hello")
        if await reader.read(5):
            found = room.front.process_of(room.peers[-1])
            writer.close()
            return found
    writer.close()
    return None


async def _send(writer: asyncio.StreamWriter, content: bytes) -> None:
    writer.write(content)
    await writer.drain()


async def _until_served(room: Room) -> None:
    """Until the front has seen the end of an earlier connection."""
    while True:
        reader, writer = await room.connect()
        with contextlib.suppress(ConnectionError):
            writer.write(b"hello")
            if await reader.read(5):
                writer.close()
                return
        writer.close()
