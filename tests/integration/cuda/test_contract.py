"""The double keeps the contract of NVIDIA's driver, and the contract has a row for every call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from doubles.cuda.control import CudaHost, Fault
from support.gpu_host import GpuHost
from weight_broker.drivers import cuda
from weight_brokerd.proof.cuda.scene import CudaScene
from weight_brokerd.proof.cuda.table import ROWS, covered
from weight_brokerd.proof.report import markdown
from weight_brokerd.proof.row import UNKNOWN, Outcome, Row, Verdict, run

NEEDS_TORCH = {"G7", "G10"}
NEEDS_A_PARTITION, NEEDS_EXCLUSIVE = {"G9.partition"}, {"C3"}
NEEDS_ROOT = {row.identity for row in ROWS if row.identity.startswith(("G4", "G5"))}
MAY_BE_BETTER = {"G4", "G4.root", "G5.ipc"}
ORDINARY = [row for row in ROWS if row.identity not in NEEDS_TORCH | NEEDS_A_PARTITION | NEEDS_EXCLUSIVE]


def named(identity: str) -> Row[CudaScene]:
    [row] = [row for row in ROWS if row.identity == identity]
    return row


def run_on(host: CudaHost, row: Row[CudaScene], **variables: str) -> Outcome[CudaScene]:
    return run(row, CudaScene({**os.environ, **host.environment(), **variables}))


def require_root(row: Row[CudaScene]) -> None:
    if row.identity in NEEDS_ROOT and os.geteuid():
        pytest.skip("other users and namespaces need root")


@pytest.mark.parametrize("row", ORDINARY, ids=lambda row: row.identity)
def test_the_double_keeps_the_contract(gpu_host: GpuHost, row: Row[CudaScene]) -> None:
    require_root(row)
    outcome = run_on(gpu_host.cuda, row)
    assert outcome.verdict is Verdict.AS_SOURCE, outcome.seen


def test_a_partitioned_gpu_keeps_the_contract(gpu_host: GpuHost) -> None:
    gpu_host.cuda.partition(0)
    outcome = run_on(gpu_host.cuda, named("G9.partition"))
    assert outcome.verdict is Verdict.AS_SOURCE, outcome.seen


def test_a_gpu_for_one_process_keeps_the_contract(gpu_host: GpuHost) -> None:
    gpu_host.cuda.inject(Fault.EXCLUSIVE_PROCESS)
    outcome = run_on(gpu_host.cuda, named("C3"))
    assert outcome.verdict is Verdict.AS_SOURCE, outcome.seen


@pytest.mark.parametrize("identity", sorted(MAY_BE_BETTER))
def test_the_better_case_shows_and_is_no_fault(gpu_host: GpuHost, identity: str) -> None:
    row = named(identity)
    require_root(row)
    outcome = run_on(gpu_host.cuda, row, CUDA_DOUBLE_SHARE_POLICY="all")
    assert (outcome.verdict, outcome.is_fault) == (Verdict.UNLIKE_SOURCE, False)
    assert outcome.seen == "0"


def test_a_driver_that_differs_is_a_fault(gpu_host: GpuHost) -> None:
    gpu_host.cuda.inject(Fault.COPY_FAILS)
    outcome = run_on(gpu_host.cuda, named("G2.copy"))
    assert outcome.is_fault, outcome


def test_every_call_of_the_product_has_a_row() -> None:
    assert set(cuda.ARGUMENTS) - covered() == set()


def test_every_row_names_its_source_and_what_needs_it() -> None:
    assert len({row.identity for row in ROWS}) == len(ROWS)
    assert all(row.functions and row.source and row.needed_by for row in ROWS)
    assert {row.identity for row in ROWS if row.source.startswith(UNKNOWN)} == {*MAY_BE_BETTER, "G8.context"}


def test_the_table_for_people_is_the_contract() -> None:
    table = (Path(__file__).parents[2] / "doubles" / "cuda" / "CONTRACT.md").read_text()
    assert table.endswith("\n" + markdown(ROWS)), "write it again: python -m weight_brokerd.proof --table cuda"


def proof(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "weight_brokerd.proof", *arguments]
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)


def test_a_proof_prints_every_row_and_writes_a_file(gpu_host: GpuHost, tmp_path: Path) -> None:
    file = tmp_path / "proof.json"
    done = proof("cuda", f"--json={file}", **gpu_host.cuda.environment())
    assert (done.returncode, done.stderr) == (0, "")
    written = json.loads(file.read_text())
    assert [row["id"] for row in written["rows"]] == [row.identity for row in ROWS]
    verdicts = {row["id"]: row["verdict"] for row in written["rows"]}
    not_run = NEEDS_TORCH | NEEDS_A_PARTITION | NEEDS_EXCLUSIVE | (NEEDS_ROOT if os.geteuid() else set())
    assert {name for name, verdict in verdicts.items() if verdict == "not_run"} == not_run
    assert set(verdicts.values()) == {"as_source", "not_run"}
    assert [gpu["name"] for gpu in written["host"]["cuda"]["gpus"]] == ["Double of a GPU"] * 4
    for row in ROWS:
        assert f"{row.identity} " in done.stdout


def test_the_doctor_proves(gpu_host: GpuHost, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "weight_broker.cli.main", "doctor", "--prove"]
    variables = {**os.environ, **gpu_host.cuda.environment(visible="")}
    done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cuda: not run" in done.stdout
    assert json.loads((tmp_path / "proof.json").read_text())["rows"] == []


def test_without_a_gpu_the_proof_says_so(gpu_host: GpuHost) -> None:
    done = proof("cuda", **gpu_host.cuda.environment(visible=""))
    assert done.returncode == 0
    assert "cuda: not run: no GPU: cuInit failed with 100" in done.stdout
