"""Whether a datasystem worker is there: it has to answer, and its kernel's connections are no answer."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest

from support.asynchronous import on_a_loop
from weight_brokerd.cards import worker_watch
from weight_brokerd.cards.worker_watch import WorkerWatch
from weight_brokerd.datasystem import greeting

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

GREETING = bytes([0xFF, 0, 0, 0, 0, 0, 0, 0, 0x13, 0x7F])


async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """As a worker."""
    writer.write(GREETING)
    while await reader.read(100):
        pass
    writer.close()


async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """As a server of another protocol."""
    writer.close()


async def stay_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while await reader.read(100):
            pass
    writer.close()


@asynccontextmanager
async def serving(serve: Serve) -> AsyncIterator[int]:
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greeting, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(worker_watch, "ASK_SECONDS", 0.05)


@pytest.mark.parametrize(("serve", "expected"), [(greet, True), (hang_up, True), (stay_silent, False)])
@on_a_loop
async def test_an_answer_of_any_kind_shows_that_it_runs(serve: Serve, expected: bool) -> None:
    async with serving(serve) as port:
        assert await greeting.answers("127.0.0.1", port) is expected


@on_a_loop
async def test_connections_that_only_the_kernel_accepts_are_no_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as hung:
        port = hung.getsockname()[1]
        assert not await greeting.answers("127.0.0.1", port)
    assert not await greeting.answers("127.0.0.1", port), "nor is a closed port"


async def changes_until(changes: asyncio.Queue[bool], last: bool) -> None:
    async with asyncio.timeout(60):
        while await changes.get() is not last:
            pass


@on_a_loop
async def test_a_worker_that_falls_silent_is_not_there_until_it_answers_again() -> None:
    silent = False

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await (stay_silent if silent else greet)(reader, writer)

    changes: asyncio.Queue[bool] = asyncio.Queue()
    async with serving(serve) as port:
        watch = WorkerWatch("127.0.0.1", port, changes.put_nowait)
        await watch.start()
        try:
            assert watch.is_there
            silent = True
            await changes_until(changes, False)
            assert not watch.is_there
            silent = False
            await watch.found(60)
            assert watch.is_there
        finally:
            await watch.close()


@on_a_loop
async def test_a_worker_that_listens_before_it_serves_is_not_there_yet() -> None:
    serves = False
    changes: asyncio.Queue[bool] = asyncio.Queue()
    async with serving(greet) as port:
        watch = WorkerWatch("127.0.0.1", port, changes.put_nowait, serves=lambda: serves)
        await watch.start()
        try:
            assert not watch.is_there
            serves = True
            await changes_until(changes, True)
            serves = False
            await changes_until(changes, False)
        finally:
            await watch.close()
