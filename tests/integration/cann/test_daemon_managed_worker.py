"""The daemon with a datasystem worker of its own: it says how that is, ends it, and survives its own death."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from doubles.cann.build import build
from doubles.cann.control import CannHost
from support.broker_process import BrokerProcess
from support.datasystem_worker import require_wheel
from support.waiting import eventually
from weight_broker.v1 import resources_pb2
from weight_brokerd.processes.start_time import start_time

SECONDS = 60

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def state() -> Iterator[Path]:
    """A short directory, because there are sockets in it."""
    require_wheel()
    directory = Path(tempfile.mkdtemp(prefix="ds-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def settings(cann_host: CannHost, state: Path) -> dict[str, str]:
    """Of a daemon on the emulated host that runs its own worker."""
    environment = cann_host.environment()
    preload = environment.pop("LD_PRELOAD")
    environment.pop("LD_LIBRARY_PATH", None)
    return {
        **environment,
        "STATE_DIRECTORY": str(state),
        "WEIGHT_BROKER_CARDS_LIBRARY_PATH": str(build().libraries),
        "WEIGHT_BROKER_CARDS_PRELOAD": preload,
        "WEIGHT_BROKER_DATASYSTEM_MANAGED": "true",
        "WEIGHT_BROKER_DATASYSTEM_SHARED_MEMORY_MB": "256",
    }


def worker_of(broker: BrokerProcess) -> resources_pb2.DatasystemWorker:
    return broker.host().datasystem_worker


def worker_pid(state: Path) -> int:
    """From the kernel: the process that runs in the worker's directory."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "exe").endswith("/datasystem_worker") and os.readlink(process / "cwd") == str(
                state / "datasystem"
            ):
                return int(process.name)
        except OSError:
            continue
    return 0


def test_the_daemon_runs_a_worker_reports_it_and_ends_it(
    start_broker: Callable[..., BrokerProcess], settings: dict[str, str], state: Path
) -> None:
    broker = start_broker(**settings)
    eventually(lambda: worker_of(broker).reachable, within=SECONDS)
    eventually(lambda: not worker_of(broker).problem, within=SECONDS)
    assert worker_of(broker).managed
    first = worker_pid(state)
    os.kill(first, signal.SIGKILL)
    eventually(lambda: "killed by SIGKILL" in worker_of(broker).problem, within=SECONDS)
    eventually(lambda: not worker_of(broker).problem and worker_of(broker).reachable, within=SECONDS)
    assert worker_pid(state) not in (0, first)
    assert broker.terminate() == 0
    assert worker_pid(state) == 0


def test_a_killed_daemon_leaves_no_worker_and_the_next_one_has_its_own(
    start_broker: Callable[..., BrokerProcess], settings: dict[str, str], state: Path
) -> None:
    broker = start_broker(**settings)
    eventually(lambda: worker_of(broker).reachable, within=SECONDS)
    begun = start_time(worker_pid(state))
    broker.kill()
    broker.start()
    eventually(lambda: worker_of(broker).reachable, within=SECONDS)
    assert start_time(worker_pid(state)) > begun
    assert broker.terminate() == 0
