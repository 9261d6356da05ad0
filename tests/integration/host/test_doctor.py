"""`weight-broker doctor` against real brokers, and against directories in which something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.broker_process import BrokerProcess
from weight_broker import BrokerClient, WeightSetKey
from weight_broker.cli.doctor import ascend as doctor_ascend
from weight_broker.cli.doctor import broker as doctor_broker
from weight_broker.cli.doctor import host as doctor_host
from weight_broker.cli.doctor.findings import Finding, Verdict
from weight_broker.cli.main import main
from weight_broker.memory.npu import driver as npu_driver

Doctor = Callable[..., tuple[int, dict[str, tuple[str, str, str]]]]


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Doctor:
    """Runs the command: exit status, and (verdict, found, fix) by check."""

    def run(directory: Path) -> tuple[int, dict[str, tuple[str, str, str]]]:
        capsys.readouterr()
        code = main(["doctor", "--runtime-directory", str(directory), "--json"])
        answer: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert answer["problem"] == sum(one["verdict"] == "problem" for one in answer["findings"])
        return code, by_check([Finding(**one) for one in answer["findings"]])

    return run


def by_check(findings: list[Finding]) -> dict[str, tuple[str, str, str]]:
    assert all(bool(one.fix) == (one.verdict != Verdict.OK) for one in findings), (
        "what is wrong has a fix, nothing else"
    )
    return {one.check: (one.verdict, one.found, one.fix) for one in findings}


def test_a_host_with_a_broker_is_fine(broker: BrokerProcess, doctor: Doctor) -> None:
    code, found = doctor(broker.runtime_directory)
    assert code == 0
    for check in ("runtime directory", "gRPC socket", "attach socket", "attach", "broker", "version", "memfd"):
        assert found[check][0] == "ok", check
    assert f"pid {broker.pid}" in found["broker"][1]
    assert broker.instances() == []  # the doctor left


def test_it_runs_as_a_command_without_rich_and_says_what_to_do(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "weight_broker.cli.main", "doctor"],
        env=os.environ | {"WEIGHT_BROKER_RUNTIME_DIRECTORY": str(tmp_path / "nobody")},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "problem" in done.stdout
    assert f"{tmp_path}/nobody does not exist" in done.stdout
    assert "-> start one" in done.stdout


def test_without_a_broker_the_host_is_still_looked_at(tmp_path: Path, doctor: Doctor) -> None:
    code, found = doctor(tmp_path)
    assert code == 1
    assert found["gRPC socket"][0] == "problem"
    assert found["memfd"][0] == "ok"
    assert "Ascend" in found


def test_sockets_of_a_broker_that_was_killed_are_told_apart_from_a_broker(
    broker: BrokerProcess, doctor: Doctor
) -> None:
    broker.kill()
    code, found = doctor(broker.runtime_directory)
    assert code == 1
    assert "killed" in found["gRPC socket"][1]


def test_what_keeps_a_broker_from_helping_is_a_warning(
    broker: BrokerProcess, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy

    with BrokerClient(broker.runtime_directory, name="publisher") as client:
        client.publish(WeightSetKey("model"), {"weight": numpy.ones(10)})
        publication = broker.publications()[0].publication_id
        directory = str(broker.runtime_directory)
        assert main(["quarantine", "--runtime-directory", directory, publication, "--reason", "bad memory"]) == 0
        assert main(["drain", "--runtime-directory", directory]) == 0
        monkeypatch.setattr(doctor_broker, "__version__", "9.9")
        code, found = doctor(broker.runtime_directory)
    assert code == 0
    assert found["draining"][0] == "warning"
    assert found["version"][0] == "warning"
    assert "bad memory" in found["quarantine"][1]


@pytest.mark.parametrize(
    ("shared", "private", "verdicts"),
    [("advise", "madvise", ("ok", "ok")), ("deny", "never", ("warning", "warning")), ("never", "always", ("ok", "ok"))],
)
def test_huge_pages_that_the_kernel_refuses_are_a_warning(
    tmp_path: Path, shared: str, private: str, verdicts: tuple[str, str]
) -> None:
    (tmp_path / "shmem_enabled").write_text(f"always within_size [{shared}] other\n")
    (tmp_path / "enabled").write_text(f"one [{private}] two\n")
    found = by_check(doctor_host.findings(None, tmp_path))
    assert (found["huge pages, shared"][0], found["huge pages, private"][0]) == verdicts


@pytest.mark.parametrize(("library", "verdict"), [(None, "warning"), (object(), "ok")])
def test_an_installation_without_the_compiled_copy_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, library: object, verdict: str
) -> None:
    monkeypatch.setattr(doctor_host, "streaming_copy", lambda: library)
    assert by_check(doctor_host.findings(None))["compiled copy"][0] == verdict


@pytest.mark.parametrize(
    ("version", "verdict"), [("24.1.rc3", "problem"), ("25.0.rc1", "warning"), ("25.3.rc1", "ok"), (None, "warning")]
)
def test_the_driver_is_compared_with_what_sharing_needs(tmp_path: Path, version: str | None, verdict: str) -> None:
    (tmp_path / "davinci0").touch()
    information = tmp_path / "version.info"
    if version is not None:
        information.write_text(f"Version={version}\n")
    found = by_check(doctor_ascend.findings(None, devices=tmp_path, driver=information))
    assert found["Ascend driver"][0] == verdict
    if verdict == "problem":
        assert npu_driver.SHARING_FLOOR in found["Ascend driver"][2]


def test_device_nodes_that_are_missing_or_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "davinci0").touch()
    (tmp_path / "davinci_manager").touch()
    found = by_check(doctor_ascend.findings(None, devices=tmp_path))
    assert found["device nodes"][0] == "problem"
    assert "devmm_svm" in found["device nodes"][1]
    assert "davinci_manager" not in found["device nodes"][1]
    for name in ("devmm_svm", "hisi_hdc"):
        (tmp_path / name).touch()
    found = by_check(doctor_ascend.findings(None, devices=tmp_path))
    assert found["device nodes"][0] == "ok"


def test_expandable_segments_are_a_problem_only_with_a_driver_that_cannot_share_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "davinci0").touch()
    monkeypatch.setenv("PYTORCH_NPU_ALLOC_CONF", "max_split_size_mb:50, expandable_segments:True")
    for version, verdict in (("25.0.rc1", "problem"), ("25.3.rc1", "ok")):
        (tmp_path / "version.info").write_text(f"Version={version}\n")
        found = by_check(doctor_ascend.findings(None, devices=tmp_path, driver=tmp_path / "version.info"))
        assert found["expandable segments"][0] == verdict


def test_a_datasystem_worker_that_is_not_there_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "davinci0").touch()
    monkeypatch.setenv("DS_WORKER_ADDR", "127.0.0.1:1")
    found = by_check(doctor_ascend.findings(None, devices=tmp_path))
    assert found["datasystem worker"][0] == "problem"
    assert "127.0.0.1:1" in found["datasystem worker"][1]
