"""`weight-broker doctor --prove` on the double: every row says what the contract says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from doubles.cann.build import CannotBuild, build
from doubles.cann.control import CannHost, Fault
from doubles.cann.run import variables
from support.datasystem_worker import require_wheel
from weight_brokerd.ascend_check.contract.machine.costs import BYTES_VARIABLE
from weight_brokerd.ascend_check.contract.table import ROWS
from weight_brokerd.proof import npu
from weight_brokerd.proof.__main__ import main

pytestmark = pytest.mark.timeout(1200)
BYTES = 16 << 20
NEEDS_TORCH_NPU = {"P14.plain", "P14.expandable", "P14.huge"}
NEEDS_A_NEWER_RELEASE = {"P9.range"}
NEEDS_ROOT = {"O2", "O3", "H6.alone"}
SILENT = {
    "P0.machine", "P6.access", "P6.key", "P6.chunk", "P9.sizes", "P15.context", "P15.key", "P15.chunks", "H5",
    "H6.loopback", "H6.alone", "S1.own", "S1.key", "S1.chunks",
}  # fmt: skip
"""Rows with a part of which no source says anything."""


@dataclass(frozen=True)
class Machine:
    """A host whose libraries and cards, like those of a real one, other users may use too."""

    host: CannHost
    libraries: Path


@pytest.fixture
def machine() -> Iterator[Machine]:
    """Three cards."""
    with _machine(cards=3) as made:
        yield made


@contextmanager
def _machine(cards: int) -> Iterator[Machine]:
    try:
        built = build().libraries
    except CannotBuild as error:
        pytest.skip(str(error))
    with CannHost(cards=cards) as host, tempfile.TemporaryDirectory(prefix="cann-") as readable:
        libraries = Path(shutil.copytree(built, readable, symlinks=True, dirs_exist_ok=True))
        (host.directory / "processes").mkdir()
        (host.directory / "board").touch()
        for path, mode in ((host.directory, 0o755), ("processes", 0o777), ("board", 0o666), (libraries, 0o755)):
            (host.directory / path).chmod(mode)
        yield Machine(host, libraries)


def prove(machine: Machine, tmp_path: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], Any]:
    """The program's end, and its proof.json."""
    file = tmp_path / "proof.json"
    environment = {**os.environ, **variables(machine.host), BYTES_VARIABLE: str(BYTES)}
    environment["WEIGHT_BROKER_CARDS_LIBRARY_PATH"] = str(machine.libraries)
    done = subprocess.run(
        [sys.executable, "-m", "weight_brokerd.proof", "npu", "--json", file, "--row-seconds", "600", *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    return done, json.loads(file.read_text()) if file.exists() else None


def verdicts(proof: Any) -> dict[str, str]:
    return {row["id"]: row["verdict"] for row in proof["rows"]}


def test_every_row_says_what_the_contract_says(machine: Machine, tmp_path: Path) -> None:
    require_wheel()
    done, proof = prove(machine, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found, not_run = verdicts(proof), NEEDS_TORCH_NPU | NEEDS_A_NEWER_RELEASE | (NEEDS_ROOT if os.geteuid() else set())
    assert list(found) == [row.identity for row in ROWS]
    assert {identity for identity, verdict in found.items() if verdict == "not_run"} == not_run, done.stdout
    assert {identity for identity, verdict in found.items() if verdict == "recorded"} == SILENT - not_run
    assert set(found.values()) == {"as_source", "recorded", "not_run"}
    assert proof["schema"] == 1
    assert proof["host"]["kernel"]
    assert proof["host"]["npu"]["tools"]
    for row in proof["rows"]:
        assert row["question"]
        assert row["decides"]
        assert row["calls"] or row["verdict"] == "not_run"


def test_a_driver_that_is_unlike_its_source_is_a_failure(machine: Machine, tmp_path: Path) -> None:
    machine.host.inject(Fault.IMPORT_REFUSED)
    done, proof = prove(machine, tmp_path, "--rows", "P5.import,M1")
    assert done.returncode == 1
    assert verdicts(proof) == {"P5.import": "unlike_source", "M1": "as_source"}
    assert "UNLIKE the source" in done.stdout
    assert "NpuDriver.map imports once" in done.stdout


def test_without_cards_nothing_is_ok(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    command = [
        sys.executable,
        "-m",
        "weight_brokerd.proof",
        "npu",
        "--rows",
        "P1,P2,M1,P4",
        "--json",
        str(tmp_path / "proof.json"),
    ]
    environment = {**os.environ, "WEIGHT_BROKER_CARDS_LIBRARY_PATH": str(tmp_path / "empty")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert "npu: not run: no Ascend" in done.stdout
    assert json.loads((tmp_path / "proof.json").read_text())["rows"] == []


def test_a_second_card_that_is_missing_is_said(tmp_path: Path) -> None:
    with _machine(cards=1) as machine:
        done, proof = prove(machine, tmp_path, "--rows", "H1")
    assert done.returncode == 0
    assert verdicts(proof) == {"H1": "not_run"}
    assert "there is no device 1" in done.stdout


def test_a_proof_for_a_pipe_leaves_the_table_to_standard_error(machine: Machine, tmp_path: Path) -> None:
    done, _ = prove(machine, tmp_path, "--rows", "M1", "--json", "-")
    assert json.loads(done.stdout)["rows"][0]["id"] == "M1"
    assert "M1" in done.stderr


def test_the_script_of_an_ascend_host_starts_the_same_proof(machine: Machine, tmp_path: Path) -> None:
    script = Path(__file__).parents[3] / "deploy/ascend-check.sh"
    file = tmp_path / "proof.json"
    done = subprocess.run(
        [script, "--prove", "--rows", "M1", "--json", file],
        env=os.environ | variables(machine.host) | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert verdicts(json.loads(file.read_text())) == {"M1": "as_source"}


def test_a_card_in_use_is_left_alone_unless_the_operator_says_so(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WEIGHT_BROKER_CARDS_LIBRARY_PATH", str(machine.libraries))
    monkeypatch.setattr(npu, "others", lambda: {77: "vllm serve model"})
    file = tmp_path / "proof.json"
    assert main(["npu", "--json", str(file), "--rows", "none"]) == 2
    assert "77 vllm serve model" in capsys.readouterr().err
    assert not file.exists()
    assert main(["npu", "--json", str(file), "--rows", "none", "--beside-others"]) == 0
    assert json.loads(file.read_text())["host"]["beside"] == {"77": "vllm serve model"}
