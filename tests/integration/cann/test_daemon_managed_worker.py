"""The daemon with a datasystem worker of its own: it says how that is, ends it, and survives its own death."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from doubles.cann.build import build
from doubles.cann.control import CannHost
from support import device_instance as instance
from support.broker_process import BrokerProcess
from support.card_process import CardProcess
from support.datasystem_worker import require_wheel
from support.device_instance import Tensor
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


@pytest.fixture
def start_instance(cann_host: CannHost, tmp_path: Path) -> Iterator[Callable[[str], CardProcess]]:
    """Starts instances of the broker in `run`; ends them after the test."""
    with ExitStack() as stack:

        def start(name: str) -> CardProcess:
            environment = {"WEIGHT_BROKER_RUNTIME_DIRECTORY": str(tmp_path / "run"), "INSTANCE_NAME": name}
            process = CardProcess(cann_host, environment=environment)
            stack.callback(process.close)
            return process

        yield start


def worker_of(broker: BrokerProcess) -> resources_pb2.DatasystemWorker:
    return broker.host().datasystem_worker


def serves(broker: BrokerProcess) -> bool:
    """A worker listens seconds before it serves: it is not said to be reachable while there is a problem."""
    worker = worker_of(broker)
    assert not (worker.reachable and worker.problem), worker.problem
    return worker.reachable


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
    eventually(lambda: serves(broker), within=SECONDS)
    assert worker_of(broker).managed
    first = worker_pid(state)
    os.kill(first, signal.SIGKILL)
    eventually(lambda: "killed by SIGKILL" in worker_of(broker).problem, within=SECONDS)
    eventually(lambda: serves(broker), within=SECONDS)
    assert worker_pid(state) not in (0, first)
    assert broker.terminate() == 0
    assert worker_pid(state) == 0


def test_a_publication_while_the_worker_starts_waits_for_it(
    start_broker: Callable[..., BrokerProcess],
    settings: dict[str, str],
    state: Path,
    start_instance: Callable[[str], CardProcess],
) -> None:
    first, second = start_instance("first"), start_instance("second")
    for model in ("model", "other"):
        first.call(instance.create, model, 0, [Tensor("weight", (256, 256))], 7)
        second.call(instance.create, model, 1, [Tensor("weight", (256, 256))], None)
    broker = start_broker(**settings)
    assert first.call(instance.publish, "model").error == ""
    assert serves(broker)
    os.kill(worker_pid(state), signal.SIGKILL)
    eventually(lambda: not serves(broker), within=SECONDS)
    assert first.call(instance.publish, "other").error == "", "another worker is being started"
    assert serves(broker)
    for model in ("model", "other"):
        filled = second.call(instance.acquire_or_load, model, 8)
        assert (filled.source, filled.data_plane) == ("first", "datasystem")


def test_a_worker_that_hangs_is_reported_and_replaced_and_weights_move_again(
    start_broker: Callable[..., BrokerProcess],
    settings: dict[str, str],
    state: Path,
    start_instance: Callable[[str], CardProcess],
) -> None:
    first, second = start_instance("first"), start_instance("second")
    first.call(instance.create, "model", 0, [Tensor("weight", (256, 256))], 7)
    second.call(instance.create, "model", 1, [Tensor("weight", (256, 256))], None)
    broker = start_broker(**settings)
    assert first.call(instance.publish, "model").error == ""
    hung = worker_pid(state)
    os.kill(hung, signal.SIGSTOP)
    eventually(lambda: not worker_of(broker).reachable, within=SECONDS)
    eventually(lambda: "does not answer" in worker_of(broker).problem, within=SECONDS)
    assert {card.state for card in broker.host().cards} == {resources_pb2.Card.STATE_DEGRADED}
    refused = second.call(instance.acquire, "model")
    assert refused.error == "TransferFailed", "at once, and not after the engine's patience"
    assert "no datasystem worker answers" in refused.message
    eventually(lambda: worker_of(broker).reachable and not worker_of(broker).problem, within=SECONDS)
    assert worker_pid(state) not in (0, hung)
    eventually(lambda: second.call(instance.acquire_or_load, "model", 8).source == "first", within=SECONDS)
    assert broker.terminate() == 0


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
