"""The datasystem worker that the broker runs itself: started, watched, ended, and never left behind."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from doubles.cann.control import CannHost
from support.asynchronous import on_a_loop
from support.card_process import CardProcess
from support.cards import configuration, move, own, supervised, until
from support.datasystem_worker import DatasystemWorker, require_wheel
from support.waiting import eventually
from weight_brokerd.config.errors import StartError
from weight_brokerd.config.settings import DatasystemSettings
from weight_brokerd.datasystem import managed_worker, ports, worker_command
from weight_brokerd.datasystem.managed_worker import ManagedWorker

SETTINGS = DatasystemSettings(managed=True, shared_memory_mb=256, extra_arguments=("--oc_thread_num=8",))
START_SECONDS = 60

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def state() -> Iterator[Path]:
    """A short directory, because there are sockets in it."""
    require_wheel()
    directory = Path(tempfile.mkdtemp(prefix="ds-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@asynccontextmanager
async def managed(state: Path, **changes: Any) -> AsyncIterator[ManagedWorker]:
    worker = ManagedWorker(replace(SETTINGS, **changes), state)
    try:
        yield worker
    finally:
        await worker.close()


def round_trip(host: str, port: int) -> None:
    """In a process of its own, as it holds the interpreter."""
    script = f"""
        import os
        from yr.datasystem import KVClient
        client = KVClient({host!r}, {port}, connect_timeout_ms=20000)
        client.init()
        client.set("round-trip", b"x" * 1000000)
        assert client.get(["round-trip"]) == [b"x" * 1000000]
        client.delete(["round-trip"])
        os._exit(0)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=60)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@on_a_loop
async def test_a_worker_is_started_serves_and_is_gone_after_the_end(state: Path) -> None:
    async with managed(state) as worker:
        with capture_logs() as logs:
            host, port = await worker.start()
            assert not worker.is_ready
            assert worker.problem, "it does not serve yet"
            assert await worker.wait_ready(START_SECONDS), worker.problem
        assert (host, worker.problem) == ("127.0.0.1", "")
        assert [entry["event"] for entry in logs] == ["datasystem_worker_ready"]
        pid = worker.pid
        assert os.readlink(f"/proc/{pid}/exe").endswith("/datasystem_worker")
        await asyncio.to_thread(round_trip, host, port)
    assert not is_running(pid)
    assert not (state / "datasystem/worker.pid").exists()


@on_a_loop
async def test_a_worker_that_dies_is_told_and_started_again_where_it_was(state: Path) -> None:
    changes: list[bool] = []
    worker = ManagedWorker(SETTINGS, state, on_change=lambda: changes.append(worker.is_ready))
    host, port = await worker.start()
    try:
        assert await worker.wait_ready(START_SECONDS), worker.problem
        first = worker.pid
        with capture_logs() as logs:
            os.kill(first, signal.SIGKILL)
            await until(lambda: "was killed by SIGKILL" in worker.problem)
            assert not worker.is_ready
            assert await worker.wait_ready(START_SECONDS), worker.problem
        assert worker.pid != first
        assert [entry["event"] for entry in logs] == ["datasystem_worker_failed", "datasystem_worker_ready"]
        assert changes == [True, False, True]
        await asyncio.to_thread(round_trip, host, port)
    finally:
        await worker.close()


@on_a_loop
async def test_a_worker_that_hangs_is_told_and_replaced(state: Path) -> None:
    changes: list[bool] = []
    worker = ManagedWorker(SETTINGS, state, on_change=lambda: changes.append(worker.is_ready))
    host, port = await worker.start()
    try:
        assert await worker.wait_ready(START_SECONDS), worker.problem
        first = worker.pid
        with capture_logs() as logs:
            os.kill(first, signal.SIGSTOP)
            await until(lambda: worker.problem == managed_worker.HANGS)
            assert not worker.is_ready
            await until(lambda: "hung and was killed" in worker.problem)
            assert not is_running(first)
            assert await worker.wait_ready(START_SECONDS), worker.problem
        assert worker.pid not in (0, first)
        failed = "datasystem_worker_failed"
        assert [entry["event"] for entry in logs] == [failed, failed, "datasystem_worker_ready"]
        assert changes == [True, False, False, True]
        await asyncio.to_thread(round_trip, host, port)
    finally:
        await worker.close()


@on_a_loop
async def test_a_worker_that_hung_for_a_moment_goes_on(state: Path) -> None:
    async with managed(state) as worker:
        host, port = await worker.start()
        assert await worker.wait_ready(START_SECONDS), worker.problem
        first = worker.pid
        os.kill(first, signal.SIGSTOP)
        await until(lambda: not worker.is_ready)
        os.kill(first, signal.SIGCONT)
        assert await worker.wait_ready(START_SECONDS), worker.problem
        assert (worker.pid, worker.problem) == (first, "")
        await asyncio.to_thread(round_trip, host, port)


@on_a_loop
async def test_weights_move_between_cards_through_a_managed_worker(
    state: Path, cann_host: CannHost, start_process: Callable[..., CardProcess]
) -> None:
    process = await asyncio.to_thread(start_process)
    source = await asyncio.to_thread(own, process, 0, 8 << 20, seed=5)
    destination = await asyncio.to_thread(own, process, 1, 8 << 20)
    async with managed(state) as worker:
        host, port = await worker.start()
        assert await worker.wait_ready(START_SECONDS), worker.problem
        other = DatasystemWorker()  # never started
        other.close()
        here = replace(configuration(cann_host, other), worker_host=host, worker_port=port, log_directory=state / "c")
        async with supervised(here) as cards:
            await cards.register(source.card, source.region)
            await move(cards, source, destination)
            assert await asyncio.to_thread(destination.digest) == await asyncio.to_thread(source.digest)
            await cards.unregister(source.card, source.region.region_id)


BROKER = """
    import asyncio, sys
    from pathlib import Path
    from weight_brokerd.datasystem.managed_worker import ManagedWorker
    from weight_brokerd.config.settings import DatasystemSettings

    async def main():
        settings = DatasystemSettings(managed=True, shared_memory_mb=256, extra_arguments=("--oc_thread_num=8",))
        worker = ManagedWorker(settings, Path(sys.argv[1]))
        await worker.start()
        await worker.wait_ready(60)
        print(worker.pid, flush=True)
        await asyncio.sleep(600)

    asyncio.run(main())
"""


def start_broker(state: Path) -> tuple[subprocess.Popen[str], int]:
    command = [sys.executable, "-c", textwrap.dedent(BROKER), str(state)]
    broker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert broker.stdout is not None
    line = next(line for line in broker.stdout if line.strip().isdigit())
    return broker, int(line)


@on_a_loop
async def test_a_worker_ends_with_its_killed_broker_and_the_next_one_starts_cleanly(state: Path) -> None:
    broker, pid = await asyncio.to_thread(start_broker, state)
    assert is_running(pid)
    broker.kill()
    broker.wait()
    await asyncio.to_thread(eventually, lambda: not is_running(pid))
    async with managed(state) as worker:
        await worker.start()
        assert await worker.wait_ready(START_SECONDS), worker.problem


@on_a_loop
async def test_a_worker_that_the_kernel_left_behind_is_ended_by_the_next_broker(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = ports.choose("127.0.0.1")
    async with managed(state, managed_port=port) as first:
        await first.start()
        assert await first.wait_ready(START_SECONDS), first.problem
        left = first.pid
        # What a killed broker leaves: the process, its record, and a lock that is free.
        record = (state / "datasystem/worker.pid").read_text()

        async def nothing(process: object) -> bool:
            return True

        monkeypatch.setattr(managed_worker, "_end", nothing)
    monkeypatch.undo()
    (state / "datasystem/worker.pid").write_text(record)
    assert is_running(left)
    async with managed(state, managed_port=port) as second:
        with capture_logs() as logs:
            await second.start()
            assert await second.wait_ready(START_SECONDS), second.problem
        assert [entry["event"] for entry in logs] == ["datasystem_worker_left_behind", "datasystem_worker_ready"]
        assert not is_running(left)
        assert second.pid != left


@on_a_loop
async def test_two_brokers_do_not_share_a_directory(state: Path) -> None:
    async with managed(state) as first, managed(state) as second:
        await first.start()
        with pytest.raises(StartError, match="another broker has its datasystem worker in"):
            await second.start()


@on_a_loop
async def test_a_port_that_somebody_else_has_is_told_and_used_once_it_is_free(state: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        async with managed(state, managed_port=port) as worker:
            assert await worker.start() == ("127.0.0.1", port)
            await until(lambda: f"port {port} on 127.0.0.1 (datasystem.managed_port)" in worker.problem)
            assert worker.pid == 0
            other.close()
            assert await worker.wait_ready(START_SECONDS), worker.problem


@on_a_loop
async def test_a_flag_that_the_worker_does_not_know_is_told_in_its_words(state: Path) -> None:
    async with managed(state, extra_arguments=("--no_such_flag=1",)) as worker:
        await worker.start()
        await until(lambda: "unknown command line flag 'no_such_flag'" in worker.problem)
        assert "ended with 1" in worker.problem


@on_a_loop
async def test_a_worker_that_never_serves_is_killed(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(managed_worker, "READY_SECONDS", 0.2)
    monkeypatch.setattr(managed_worker, "STOP_SECONDS", 0.2)
    async with managed(state) as worker:
        await worker.start()
        await until(lambda: worker.pid != 0)
        pid = worker.pid
        await until(lambda: "did not serve within 0.2 s" in worker.problem)
        assert not is_running(pid)


@on_a_loop
async def test_memory_that_is_not_there_is_not_promised(state: Path) -> None:
    async with managed(state, shared_memory_mb=64 << 20) as worker:
        await worker.start()
        await until(lambda: "datasystem.shared_memory_mb is 67108864, but" in worker.problem)
        assert worker.pid == 0


@on_a_loop
async def test_a_missing_wheel_is_told_with_what_to_install(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_command, "_PACKAGE", "yr.no_such_package")
    async with managed(state) as worker:
        await worker.start()
        await until(lambda: "pip install openyuanrong-datasystem" in worker.problem)


@on_a_loop
async def test_a_directory_that_is_too_long_for_sockets_is_refused_with_what_would_fit(state: Path) -> None:
    async with managed(state, directory=str(state / ("x" * 80))) as worker:
        with pytest.raises(StartError, match="at most 76 bytes"):
            await worker.start()
