"""Fixtures: an emulated Ascend host, processes on it, a real datasystem worker."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from doubles.cann.build import CannotBuild, build
from doubles.cann.control import CannHost
from support import datasystem_actions
from support.card_process import CardProcess
from support.cards import CardScene
from support.datasystem_worker import DatasystemWorker, require_wheel
from support.device_host import DeviceHost


@pytest.fixture
def cann_host() -> Iterator[CannHost]:
    """A host with 8 cards of 4 GiB."""
    try:
        build()
    except CannotBuild as error:
        if "needs a C compiler" in str(error):
            pytest.skip(str(error))
        raise
    with CannHost() as host:
        yield host
        assert not [words for words in host.violations() if "before aclInit" in words]


@pytest.fixture
def start_process(cann_host: CannHost) -> Iterator[Callable[..., CardProcess]]:
    """Starts processes on the host; ends them after the test."""
    with ExitStack() as stack:

        def start(**options: Any) -> CardProcess:
            process = CardProcess(cann_host, **options)
            stack.callback(process.close)
            return process

        yield start


@pytest.fixture
def start_client(start_process: Callable[..., CardProcess]) -> Callable[[DatasystemWorker], CardProcess]:
    """Starts processes that have one HeteroClient, named "client"."""

    def start(worker: DatasystemWorker) -> CardProcess:
        environment = {
            "DATASYSTEM_CLIENT_LOG_DIR": str(worker.directory / "clients"),
            "DS_D2H_MEMCPY_POLICY": "direct",  # the default takes a pool of 2.7 GB
            "DS_H2D_MEMCPY_POLICY": "direct",
        }
        process = start_process(environment=environment)
        process.call(datasystem_actions.connect, "client", worker.port)
        return process

    return start


@pytest.fixture
def scene(cann_host: CannHost, worker: DatasystemWorker, start_process: Callable[..., CardProcess]) -> CardScene:
    """What a test of the card processes takes place on."""
    return CardScene(cann_host, worker, start_process)


@pytest.fixture
def key() -> str:
    """A key that nobody else uses."""
    return f"test-{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def worker() -> Iterator[DatasystemWorker]:
    """A datasystem worker for all tests that leave it as it was."""
    require_wheel()
    running = DatasystemWorker()
    try:
        yield running.start()
    finally:
        running.close()


@pytest.fixture
def device_host(cann_host: CannHost, worker: DatasystemWorker, tmp_path: Path) -> Iterator[DeviceHost]:
    """A host whose broker and instances the test starts."""
    host = DeviceHost(cann_host, tmp_path, worker)
    try:
        yield host
    finally:
        host.close()
