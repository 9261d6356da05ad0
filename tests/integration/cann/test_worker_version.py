"""The version of a datasystem worker that the operator runs: the worker does not say it, its program's wheel does."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from doubles.cann.control import CannHost
from support.datasystem_worker import VERSION, DatasystemWorker, require_wheel
from support.device_host import DeviceHost
from support.waiting import eventually
from weight_broker.drivers import datasystem_worker

WHEEL = Path(sysconfig.get_path("purelib"), "yr", "datasystem")
TEMPORARY = ("rocksdb", "uds", "probe", "datasystem")

pytestmark = pytest.mark.timeout(180)


class OldWorker:
    """The program of the real wheel in a wheel that says that it is older."""

    def __init__(self, directory: Path, like: DatasystemWorker) -> None:
        """With the flags of a worker that runs, which is ended."""
        directory.mkdir()
        program = Path(shutil.copy(WHEEL / datasystem_worker.PROGRAM, directory))
        (directory / "VERSION").write_text("0.7.7\n")
        flags = Path(f"/proc/{like.pid}/cmdline").read_text().rstrip("\0").split("\0")[1:]
        like.kill()
        for name in TEMPORARY:
            shutil.rmtree(like.directory / name, ignore_errors=True)
        environment = {**os.environ, "LD_LIBRARY_PATH": str(WHEEL / "lib")}
        environment.pop("LD_PRELOAD", None)
        self.process = subprocess.Popen(
            [program, *flags],
            cwd=like.directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def close(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[DatasystemWorker]:
    require_wheel()
    worker = DatasystemWorker()
    try:
        yield worker.start()
    finally:
        worker.close()


def test_a_real_worker_is_found_by_its_address_with_the_version_of_its_wheel(worker: DatasystemWorker) -> None:
    expected = datasystem_worker.RunningWorker(worker.pid, VERSION)
    assert datasystem_worker.find(f"127.0.0.1:{worker.port}") == expected
    assert datasystem_worker.find(f"127.0.0.1:{worker.metastore_port}") is None


def test_a_broker_says_that_its_worker_is_too_old_until_a_newer_one_answers(
    cann_host: CannHost, running: DatasystemWorker, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        old = OldWorker(tmp_path / "wheel", running)
        stack.callback(old.close)
        host = DeviceHost(cann_host, tmp_path, running)
        stack.callback(host.close)
        broker = host.start_broker()
        eventually(lambda: broker.host().datasystem_worker.problem != "", within=60)
        worker = broker.host().datasystem_worker
        assert worker.reachable, "it may work, so it is used"
        assert f"(pid {old.process.pid}) is of openyuanrong-datasystem 0.7.7, older than 0.8.0" in worker.problem
        assert "run pip install 'openyuanrong-datasystem>=0.8.0' where it is installed" in worker.problem
        eventually(lambda: "datasystem_worker_too_old" in broker.log)
        old.close()
        for name in TEMPORARY:
            shutil.rmtree(running.directory / name, ignore_errors=True)
        running.start()
        eventually(lambda: broker.host().datasystem_worker.problem == "", within=60)
        eventually(lambda: f'"version": "{VERSION}"' in broker.log)
