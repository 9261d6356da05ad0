"""The doctor on the datasystem worker."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from weight_broker.cli.doctor.ascend_worker import finding
from weight_broker.cli.doctor.findings import Verdict
from weight_broker.cli.inspector import State
from weight_broker.v1 import resources_pb2 as pb

ADDRESS = "127.0.0.1:31501"


def state(*, reachable: bool = True, managed: bool = False, problem: str = "") -> State:
    worker = pb.DatasystemWorker(address=ADDRESS, reachable=reachable, managed=managed, problem=problem)
    return State(pb.Host(datasystem_worker=worker))


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A /proc with this process alone."""
    (tmp_path / "self").mkdir()
    (tmp_path / "self/status").write_text("NSpid:\t1\n")
    return tmp_path


def add_worker(proc: Path, version: str) -> None:
    wheel = proc / "wheel"
    wheel.mkdir()
    (wheel / "VERSION").write_text(version)
    process = proc / "8"
    process.mkdir()
    (process / "cmdline").write_bytes(f"{wheel}/datasystem_worker\0--worker_address={ADDRESS}\0".encode())
    (process / "status").write_text("NSpid:\t8\n")


def test_a_new_worker_is_fine_and_has_its_version(proc: Path) -> None:
    add_worker(proc, "0.8.1")
    found = finding(state(), proc)
    assert (found.verdict, found.fix) == (Verdict.OK, "")
    assert found.found.endswith("reachable, openyuanrong-datasystem 0.8.1")


def test_an_old_worker_is_named_with_what_to_install(proc: Path) -> None:
    add_worker(proc, "0.7.7")
    found = finding(state(), proc)
    assert found.verdict is Verdict.WARNING
    assert f"worker at {ADDRESS} (pid 8) is of openyuanrong-datasystem 0.7.7, older than 0.8.0" in found.found
    assert found.fix == "run pip install 'openyuanrong-datasystem>=0.8.0' where it is installed, and restart it"


def test_what_the_broker_has_found_is_said_where_the_process_cannot_be_seen(proc: Path) -> None:
    found = finding(state(problem="the datasystem worker is old; run pip install"), proc)
    assert (found.verdict, found.fix) == (Verdict.WARNING, "run pip install")


@pytest.mark.parametrize("is_seen", [True, False])
def test_a_version_that_cannot_be_seen_is_said_to_be_unknown_with_where_to_look(proc: Path, is_seen: bool) -> None:
    if is_seen:
        add_worker(proc, "")
    found = finding(state(), proc)
    assert found.verdict is Verdict.OK
    assert "a worker does not say its version" in found.found
    assert "`pip show openyuanrong-datasystem` in its environment does" in found.found
    assert ("(pid 8)" in found.found) is is_seen


def test_a_worker_of_the_broker_is_of_the_brokers_wheel(proc: Path) -> None:
    assert "version" not in finding(state(managed=True), proc).found


def test_a_worker_that_is_away_is_a_problem(proc: Path) -> None:
    found = finding(state(reachable=False), proc)
    assert found.verdict is Verdict.PROBLEM
    assert "AWAY" in found.found


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def test_without_a_broker_the_worker_of_the_environment_is_looked_at(
    proc: Path, monkeypatch: pytest.MonkeyPatch, listener: socket.socket
) -> None:
    monkeypatch.setenv("DS_WORKER_ADDR", f"127.0.0.1:{listener.getsockname()[1]}")
    found = finding(None, proc)
    assert found.verdict is Verdict.OK
    assert "a worker does not say its version" in found.found
    listener.close()
    assert finding(None, proc).verdict is Verdict.PROBLEM
    monkeypatch.delenv("DS_WORKER_ADDR")
    assert finding(None, proc).verdict is Verdict.WARNING
