"""Host objects through a process of their own, with the real engine and a real worker."""

from __future__ import annotations

import ast
import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from support.asynchronous import on_a_loop
from support.cards import until
from support.datasystem_worker import DatasystemWorker, require_wheel
from weight_brokerd.datasystem import objects, worker_command
from weight_brokerd.datasystem.credentials import credentials
from weight_brokerd.datasystem.errors import (
    ObjectError,
    ObjectNotFound,
    ObjectRefused,
    ObjectsLost,
    ObjectsTimeout,
    ObjectsUnavailable,
)
from weight_brokerd.datasystem.object_value import ObjectValue
from weight_brokerd.datasystem.objects import HostObjects, ObjectsConfiguration
from weight_brokerd.settings import DatasystemSettings

MIB = 1 << 20
ARENAS = 16

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def own_worker() -> Iterator[DatasystemWorker]:
    """A worker that the test may kill."""
    require_wheel()
    worker = DatasystemWorker(shared_memory_mb=256)
    yield worker.start()
    worker.close()


@asynccontextmanager
async def connected(worker: DatasystemWorker, **changes: Any) -> AsyncIterator[HostObjects]:
    configuration = ObjectsConfiguration(
        "127.0.0.1", worker.port, log_directory=worker.directory / "clients", **changes
    )
    host_objects = HostObjects(configuration)
    try:
        yield host_objects
    finally:
        await host_objects.close()


def open_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("size", [1, 100, 499_999, MIB + 7, 40 * MIB])
@on_a_loop
async def test_a_value_comes_back_bit_for_bit(worker: DatasystemWorker, key: str, size: int) -> None:
    content = os.urandom(size)
    async with connected(worker) as host_objects:
        await host_objects.put(key, content)
        assert await host_objects.exists([key, f"{key}-other"]) == [True, False]
        with await host_objects.get(key) as value:
            assert value.size_bytes == size
            assert value.read() == content
        await host_objects.delete([key, f"{key}-other"])
        assert await host_objects.exists([key]) == [False]
        assert host_objects.problem == ""


@on_a_loop
async def test_a_value_is_replaced_and_one_that_was_read_stays_as_it_was(worker: DatasystemWorker, key: str) -> None:
    async with connected(worker) as host_objects:
        await host_objects.put(key, b"a" * MIB)
        with await host_objects.get(key) as before:
            await host_objects.put(key, b"b" * (2 * MIB))
            with await host_objects.get(key) as after:
                assert after.read() == b"b" * (2 * MIB)
            await host_objects.delete([key])
            assert before.read() == b"a" * MIB


@on_a_loop
async def test_part_of_somebodys_memory_is_a_value(worker: DatasystemWorker, key: str) -> None:
    async with connected(worker) as host_objects:
        with ObjectValue.of(b"x" * MIB + b"y") as memory:
            memory.size_bytes = MIB
            await host_objects.put(key, memory)
            memory.size_bytes = MIB + 2
            with pytest.raises(ObjectRefused, match="has 1048577 bytes instead of 1048578"):
                await host_objects.put(key, memory)
        with await host_objects.get(key) as value:
            assert value.read() == b"x" * MIB
        await host_objects.delete([key])


@on_a_loop
async def test_the_worker_forgets_a_value_when_it_is_told_to(worker: DatasystemWorker, key: str) -> None:
    async with connected(worker) as host_objects:
        await host_objects.put(key, b"soon gone", ttl_seconds=1)
        for _ in range(600):
            if await host_objects.exists([key]) == [False]:
                return
            await asyncio.sleep(0.1)
        pytest.fail("it is still there after a minute")


@on_a_loop
async def test_a_missing_object_is_told_at_once_and_harms_nothing(worker: DatasystemWorker, key: str) -> None:
    async with connected(worker) as host_objects:
        assert await host_objects.exists([key]) == [False]
        pid = host_objects.pid
        with pytest.raises(ObjectNotFound, match=key):
            await host_objects.get(key, timeout=30)
        assert host_objects.pid == pid
        assert host_objects.problem == ""


@on_a_loop
async def test_memory_that_the_worker_does_not_have_is_told_in_the_engines_words(
    own_worker: DatasystemWorker, key: str
) -> None:
    async with connected(own_worker, request_seconds=6) as host_objects:
        with pytest.raises(ObjectRefused, match=r"Out of memory|no memory left for"):
            await host_objects.put(key, bytes(300 * MIB), timeout=60)
        assert await host_objects.exists([key]) == [False]
        await host_objects.put(key, b"small")


@pytest.mark.parametrize("name", ["", "a/b", "a.b", "a b", "x" * 256])
@on_a_loop
async def test_what_is_no_key_is_refused_before_anybody_is_asked(name: str) -> None:
    host_objects = HostObjects(ObjectsConfiguration("127.0.0.1", 1))
    for request in (host_objects.put(name, b"x"), host_objects.get(name), host_objects.delete([name])):
        with pytest.raises(ValueError, match="is not a key"):
            await request
    with pytest.raises(ValueError, match="from 1 to 10000"):
        await host_objects.exists([])
    with pytest.raises(ValueError, match="from 1 to 10000"):
        await host_objects.exists(["k"] * 10_001)
    with pytest.raises(ValueError, match="is empty"):
        await host_objects.put("k", b"")


@on_a_loop
async def test_requests_at_once_are_all_done(worker: DatasystemWorker, key: str) -> None:
    async with connected(worker) as host_objects:
        contents = {f"{key}-{index}": os.urandom(600_000 + index) for index in range(20)}
        await asyncio.gather(*(host_objects.put(name, content) for name, content in contents.items()))
        values = await asyncio.gather(*(host_objects.get(name) for name in contents))
        assert [value.read() for value in values] == list(contents.values())
        for value in values:
            value.close()
        await host_objects.delete(list(contents))


@on_a_loop
async def test_the_check_stores_reads_and_deletes(worker: DatasystemWorker) -> None:
    async with connected(worker) as host_objects:
        seconds = await host_objects.check(timeout=60)
        assert seconds.keys() == {"put", "get", "delete"}


@on_a_loop
async def test_descriptors_do_not_pile_up(worker: DatasystemWorker, key: str) -> None:
    async with connected(worker) as host_objects:

        async def turn() -> None:
            await host_objects.put(key, b"x" * MIB)
            (await host_objects.get(key)).close()

        await turn()
        ours, theirs = open_descriptors(os.getpid()), open_descriptors(host_objects.pid)
        for _ in range(2 * ARENAS):
            await turn()
        assert open_descriptors(os.getpid()) == ours
        assert open_descriptors(host_objects.pid) - theirs < ARENAS, "the engine keeps one for each arena of the worker"
        await host_objects.delete([key])


# Deaths


@on_a_loop
async def test_a_killed_process_costs_its_request_and_the_next_one_has_another(
    worker: DatasystemWorker, key: str
) -> None:
    async with connected(worker) as host_objects:
        await host_objects.put(key, b"kept")
        pid = host_objects.pid
        os.kill(pid, signal.SIGSTOP)
        running = asyncio.create_task(host_objects.get(key))
        await asyncio.sleep(0.2)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ObjectsLost, match="was killed by SIGKILL"):
            await running
        assert "was killed by SIGKILL" in host_objects.problem
        with await host_objects.get(key) as value:
            assert value.read() == b"kept"
        assert host_objects.pid != pid
        assert host_objects.problem == ""
        await host_objects.delete([key])


@on_a_loop
async def test_a_process_that_hangs_is_killed_when_the_deadline_passes(worker: DatasystemWorker, key: str) -> None:
    async with connected(worker) as host_objects:
        await host_objects.put(key, b"kept")
        pid = host_objects.pid
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(ObjectsTimeout, match=r"was not done within 0\.5 s"):
            await host_objects.get(key, timeout=0.5)
        assert is_gone(pid)
        with await host_objects.get(key) as value:
            assert value.read() == b"kept"
        await host_objects.delete([key])


@on_a_loop
async def test_who_waits_behind_a_request_that_hangs_is_told_that_his_was_not_begun(
    worker: DatasystemWorker, key: str
) -> None:
    async with connected(worker) as host_objects:
        await host_objects.exists([key])
        os.kill(host_objects.pid, signal.SIGSTOP)
        first = asyncio.create_task(host_objects.put(key, b"x", timeout=5))
        await asyncio.sleep(0.1)
        with pytest.raises(ObjectsTimeout, match="was not begun"):
            await host_objects.exists([key], timeout=0.2)
        with pytest.raises(ObjectsTimeout, match="was killed"):
            await first


@on_a_loop
async def test_a_request_that_is_cancelled_does_not_delay_the_next(worker: DatasystemWorker, key: str) -> None:
    async with connected(worker) as host_objects:
        await host_objects.exists([key])
        os.kill(host_objects.pid, signal.SIGSTOP)
        running = asyncio.create_task(host_objects.exists([key]))
        await asyncio.sleep(0.1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert await host_objects.exists([key]) == [False]


@on_a_loop
async def test_the_end_does_not_wait_for_a_request_that_hangs(worker: DatasystemWorker, key: str) -> None:
    async with connected(worker) as host_objects:
        await host_objects.exists([key])
        pid = host_objects.pid
        os.kill(pid, signal.SIGSTOP)
        running = asyncio.create_task(host_objects.exists([key], timeout=60))
        await asyncio.sleep(0.1)
        await asyncio.wait_for(host_objects.close(), 30)
        with pytest.raises(ObjectError):
            await running
        assert is_gone(pid)
        with pytest.raises(ObjectsUnavailable, match="the daemon ends"):
            await host_objects.exists([key])


@on_a_loop
async def test_an_idle_process_ends(worker: DatasystemWorker, key: str) -> None:
    async with connected(worker, idle_seconds=0.2) as host_objects:
        await host_objects.exists([key])
        pid = host_objects.pid
        await until(lambda: is_gone(pid))
        assert host_objects.pid == 0
        assert await host_objects.exists([key]) == [False]


@on_a_loop
async def test_a_worker_that_was_never_there_is_told_at_once() -> None:
    host_objects = HostObjects(ObjectsConfiguration("127.0.0.1", 1))
    with pytest.raises(ObjectsUnavailable, match=r"no datasystem worker answers at 127\.0\.0\.1:1: "):
        await host_objects.check(timeout=5)
    assert "no datasystem worker answers" in host_objects.problem
    await host_objects.close()


@on_a_loop
async def test_a_worker_that_hangs_is_told_in_the_engines_words_before_the_deadline(
    own_worker: DatasystemWorker, key: str
) -> None:
    async with connected(own_worker, request_seconds=6) as host_objects:
        await host_objects.put(key, b"kept")
        os.kill(own_worker.pid, signal.SIGSTOP)
        try:
            with pytest.raises(ObjectsUnavailable, match="RPC unavailable"):
                await host_objects.get(key, timeout=60)
        finally:
            os.kill(own_worker.pid, signal.SIGCONT)
        with await host_objects.get(key, timeout=20) as value:
            assert value.read() == b"kept"


@on_a_loop
async def test_a_worker_that_was_killed_and_started_again_is_used_again(own_worker: DatasystemWorker, key: str) -> None:
    async with connected(own_worker, request_seconds=6) as host_objects:
        await host_objects.put(key, b"lost with the worker")
        own_worker.kill()
        with pytest.raises(ObjectsUnavailable):
            await host_objects.get(key, timeout=60)
        with pytest.raises(ObjectsUnavailable, match="no datasystem worker answers"):
            await host_objects.get(key)
        await asyncio.to_thread(own_worker.start)
        with pytest.raises(ObjectNotFound):
            await host_objects.get(key, timeout=20)
        await host_objects.check(timeout=20)
        assert host_objects.problem == ""


@on_a_loop
async def test_the_check_finds_a_worker_that_gives_other_bytes_back(
    worker: DatasystemWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(worker) as host_objects:
        get: Callable[..., Any] = host_objects.get

        async def other(key: str, **options: Any) -> ObjectValue:
            (await get(key, **options)).close()
            return ObjectValue.of(bytes(objects._CHECK_BYTES))

        monkeypatch.setattr(host_objects, "get", other)
        with pytest.raises(ObjectError, match="other bytes"):
            await host_objects.check(timeout=20)


@pytest.mark.parametrize(("module", "client"), [("kv_client", "KVClient"), ("hetero_client", "HeteroClient")])
def test_credentials_have_the_names_of_the_clients_arguments(module: str, client: str, tmp_path: Path) -> None:
    require_wheel()
    secret = tmp_path / "secret"
    secret.write_text("secret")
    files = {one.name: str(secret) for one in fields(DatasystemSettings) if one.name.endswith("_file")}
    given = credentials(DatasystemSettings(tenant_id="tenant", **files))  # type: ignore[arg-type]
    source = (worker_command.wheel() / f"{module}.py").read_text()
    (definition,) = (one for one in ast.parse(source).body if isinstance(one, ast.ClassDef) and one.name == client)
    (constructor,) = (one for one in definition.body if isinstance(one, ast.FunctionDef) and one.name == "__init__")
    assert len(given) == 7
    assert given.keys() <= {argument.arg for argument in constructor.args.args}
