"""Rows run in processes of their own; what becomes of those is a verdict, and never one that says ok."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from doubles.cann.control import is_alive
from support.waiting import eventually
from weight_brokerd.ascend_check.contract.row import REFUSED, UNKNOWN, Assumed, Row, verdict_of
from weight_brokerd.ascend_check.contract.row import Verdict as ContractVerdict
from weight_brokerd.proof import report, runner
from weight_brokerd.proof.runner import Result, Verdict


def outcome(program: str, seconds: float = 60.0) -> tuple[Verdict, str]:
    found = runner._outcome([sys.executable, "-c", program], seconds)
    return Verdict(found["verdict"]), found["seen"]


def test_a_row_that_hangs_is_killed_with_its_children_and_not_run(tmp_path: Path) -> None:
    child = tmp_path / "child"
    program = (
        "import pathlib, subprocess, time\n"
        f"pathlib.Path({str(child)!r}).write_text(str(subprocess.Popen(['sleep', '1000']).pid))\n"
        "time.sleep(1000)\n"
    )
    verdict, seen = outcome(program, seconds=1.0)
    assert verdict is Verdict.NOT_RUN
    assert "did not end within 1 s" in seen
    if child.exists():
        eventually(lambda: not is_alive(int(child.read_text())))


def test_a_row_whose_process_dies_is_not_run_and_says_how() -> None:
    verdict, seen = outcome("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert (verdict, seen) == (Verdict.NOT_RUN, "the row's process ended with -11: without a word")


def test_a_row_that_ends_is_what_it_says() -> None:
    answer = {"verdict": "as_source", "seen": "0", "calls": []}
    assert outcome(f"print({json.dumps(answer)!r})") == (Verdict.AS_SOURCE, "0")


@pytest.mark.parametrize(
    ("expected", "seen", "verdict"),
    [
        ((0, REFUSED), (0, 507899), ContractVerdict.AS_SOURCE),
        ((0, REFUSED), (0, 0), ContractVerdict.UNLIKE_SOURCE),
        ((0, Assumed(REFUSED)), (0, 107000), ContractVerdict.AS_SOURCE),
        ((0, Assumed(REFUSED)), (0, 0), ContractVerdict.RECORDED),
        ((0, Assumed(REFUSED)), (1, 0), ContractVerdict.UNLIKE_SOURCE),
        (UNKNOWN, (1, 2), ContractVerdict.RECORDED),
        (((True, UNKNOWN),), ((False, 3),), ContractVerdict.UNLIKE_SOURCE),
    ],
)
def test_only_what_the_source_says_can_be_unlike_it(expected: object, seen: object, verdict: ContractVerdict) -> None:
    assert verdict_of(expected, seen) is verdict


def test_the_verdicts_of_the_contract_and_of_the_report_are_the_same() -> None:
    assert [verdict.name.lower() for verdict in ContractVerdict] == [verdict.value for verdict in Verdict]
    assert [verdict.value for verdict in ContractVerdict] == list(report.SHOWN.values())


def test_the_report_has_the_question_the_answer_and_what_it_decides() -> None:
    row = Row("P9", ("aclrtMalloc",), "done", (0, REFUSED), "source", "needed", "any", "", "8.5", lambda scene: 0)
    document = report.document(
        {"npu": {}}, [Result(row, Verdict.UNLIKE_SOURCE, "(0, 0)", [{"name": "aclrtMalloc"}], 0.5)]
    )
    assert document["schema"] == 1
    [entry] = document["rows"]
    assert entry["expected"] == "(0, refused)"
    assert entry["seen"] == {"value": "(0, 0)", "seconds": 0.5}
    assert (entry["verdict"], entry["decides"], entry["calls"]) == (
        "unlike_source",
        "needed",
        [{"name": "aclrtMalloc"}],
    )
