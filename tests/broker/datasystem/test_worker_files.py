"""What surrounds a managed worker: its command line, its directory, its ports, and that it ends with its parent."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.asynchronous import on_a_loop
from support.waiting import eventually
from weight_brokerd.config.errors import StartError
from weight_brokerd.config.settings import DatasystemSettings
from weight_brokerd.datasystem import launch, ports, worker_command
from weight_brokerd.datasystem.leftover import WorkerDirectory
from weight_brokerd.datasystem.worker_command import NoWheelError, WorkerFiles, command, environment
from weight_brokerd.processes.start_time import start_time

SECONDS = 60


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """The files of a wheel that matter here."""
    root = tmp_path / "wheel"
    root.mkdir()
    program = root / "datasystem_worker"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    defaults = {
        "log_dir": {"value": "./datasystem/logs"},
        "oc_thread_num": {"value": "32"},
        "etcd_address": {"value": ""},
        "spill_size_limit": {"value": 0},
        "rocksdb_write_mode": {"value": "async"},
        "yuanrong_iam_cert": {"description": "has no value"},
    }
    (root / "worker_config.json").write_text(json.dumps(defaults))
    return root


@pytest.fixture
def sleeper() -> Iterator[Callable[[], int]]:
    """Starts processes that do nothing."""
    with ExitStack() as stack:

        def start() -> int:
            process = stack.enter_context(subprocess.Popen(["sleep", "600"]))
            stack.callback(process.kill)
            return process.pid

        yield start


def flags_of(root: Path, settings: DatasystemSettings, directory: Path) -> dict[str, str]:
    line = command(root, settings, WorkerFiles(directory), port=1, metastore_port=2)
    assert line[5] == str(root / "datasystem_worker")
    return dict(flag.removeprefix("--").split("=", 1) for flag in line[6:])


def test_a_worker_gets_the_wheels_defaults_in_our_directory_and_then_what_is_set(wheel: Path, tmp_path: Path) -> None:
    settings = DatasystemSettings(shared_memory_mb=99, extra_arguments=("--oc_thread_num=4", "--max_log_size=9"))
    assert flags_of(wheel, settings, tmp_path) == {
        "log_dir": f"{tmp_path}/logs",
        "oc_thread_num": "4",
        "spill_size_limit": "0",
        "rocksdb_write_mode": "none",
        "client_dead_timeout_s": "30",
        "max_log_size": "9",
        "max_log_file_num": "3",
        "worker_address": "127.0.0.1:1",
        "metastore_address": "127.0.0.1:2",
        "start_metastore_service": "true",
        "shared_memory_size_mb": "99",
    }


def test_a_wheel_that_is_not_whole_is_to_be_installed_again(wheel: Path, tmp_path: Path) -> None:
    (wheel / "worker_config.json").write_text("[]")
    with pytest.raises(NoWheelError, match="Install openyuanrong-datasystem again"):
        flags_of(wheel, DatasystemSettings(), tmp_path)
    (wheel / "datasystem_worker").unlink()
    with pytest.raises(NoWheelError, match="install openyuanrong-datasystem again"):
        flags_of(wheel, DatasystemSettings(), tmp_path)


def test_without_a_wheel_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_command, "_PACKAGE", "no_such_package.datasystem")
    with pytest.raises(NoWheelError, match="pip install openyuanrong-datasystem"):
        worker_command.wheel()


def test_a_worker_hears_nothing_of_the_service_manager_of_preloads_or_of_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("LD_PRELOAD", "LD_LIBRARY_PATH", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WEIGHT_BROKER_LOG_LEVEL"):
        monkeypatch.setenv(name, "x")
    assert "PATH" in environment()
    assert "x" not in environment().values()


def test_a_launched_program_is_killed_when_its_parent_is(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, subprocess, sys\n"
            f"line = [sys.executable, '-I', {launch.__file__!r}, str(os.getpid()), '/libraries', '/bin/sleep', '600']\n"
            "print(subprocess.Popen(line).pid, flush=True)\n"
            "sys.stdin.read()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    assert parent.stdin is not None
    child = int(parent.stdout.readline())
    eventually(lambda: Path(f"/proc/{child}/cmdline").read_bytes().startswith(b"/bin/sleep"), within=SECONDS)
    assert b"LD_LIBRARY_PATH=/libraries\0" in Path(f"/proc/{child}/environ").read_bytes()
    parent.kill()
    parent.wait()
    eventually(lambda: has_ended(child), within=SECONDS)
    parent.stdin.close()
    parent.stdout.close()


def test_a_program_whose_parent_is_gone_already_is_not_started(tmp_path: Path) -> None:
    mark = tmp_path / "started"
    somebody_else = "1"
    line = [sys.executable, "-I", launch.__file__, somebody_else, "", "/usr/bin/touch", str(mark)]
    subprocess.run(line, check=True)
    assert not mark.exists()


@on_a_loop
async def test_a_recorded_process_that_still_runs_is_ended(tmp_path: Path, sleeper: Callable[[], int]) -> None:
    pid = sleeper()
    directory = WorkerDirectory(tmp_path)
    directory.record(pid)
    assert await directory.end_leftover(SECONDS)
    assert has_ended(pid)
    assert not (tmp_path / "worker.pid").exists()


@pytest.mark.parametrize("change", [{"start_time": 1}, {"boot_id": "another boot"}])
@on_a_loop
async def test_another_process_with_the_recorded_number_is_left_alone(
    tmp_path: Path, sleeper: Callable[[], int], change: dict[str, object]
) -> None:
    pid = sleeper()
    directory = WorkerDirectory(tmp_path)
    directory.record(pid)
    record = json.loads((tmp_path / "worker.pid").read_text())
    assert (record["pid"], record["start_time"]) == (pid, start_time(pid))
    (tmp_path / "worker.pid").write_text(json.dumps({**record, **change}))
    assert await directory.end_leftover(SECONDS)
    assert not has_ended(pid)


@pytest.mark.parametrize("record", ["", "{", "[]", '{"pid": "x"}', '{"pid": 99999999, "start_time": 1, "boot_id": ""}'])
@on_a_loop
async def test_a_record_that_means_nothing_is_dropped(tmp_path: Path, record: str) -> None:
    directory = WorkerDirectory(tmp_path)
    (tmp_path / "worker.pid").write_text(record)
    assert await directory.end_leftover(SECONDS)
    assert not (tmp_path / "worker.pid").exists()


def test_a_directory_has_one_broker_until_it_is_closed(tmp_path: Path) -> None:
    first = WorkerDirectory(tmp_path / "made/here")
    assert (tmp_path / "made/here").stat().st_mode & 0o777 == 0o700
    with pytest.raises(StartError, match="another broker"):
        WorkerDirectory(tmp_path / "made/here")
    first.close()
    first.close()
    WorkerDirectory(tmp_path / "made/here").close()


def test_a_directory_that_cannot_be_made_is_refused_with_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match=r"datasystem\.directory: .* cannot be made or written: Not a directory"):
        WorkerDirectory(tmp_path / "file/below")


def test_chosen_ports_are_free_and_not_those_of_clients() -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found = [ports.choose("127.0.0.1") for _ in range(20)]
    assert all(ports.is_free("127.0.0.1", port) and port < max(lowest, 16_384) for port in found)


def test_a_port_that_is_listened_on_is_not_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert not ports.is_free("127.0.0.1", server.getsockname()[1])


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True
