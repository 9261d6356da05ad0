"""`weight-broker doctor --prove` starts the broker's proof."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import pytest

from weight_broker.cli.failure import ExitCode
from weight_broker.cli.main import main


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that were started; each ends with 0."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_what_was_asked_for_is_handed_on(started: list[list[str]]) -> None:
    assert main(["doctor", "--prove"]) == ExitCode.DONE
    assert main(["doctor", "--prove", "here.json", "--beside-others", "--as-unit", "a", "b"]) == ExitCode.DONE
    program = [sys.executable, "-m", "weight_brokerd.proof"]
    assert started == [
        [*program, "--json=proof.json"],
        [*program, "--json=here.json", "--beside-others", "--as-unit", "a", "b"],
    ]


@pytest.mark.parametrize(("status", "code"), [(1, ExitCode.FAILED), (2, ExitCode.USAGE), (-9, ExitCode.FAILED)])
def test_its_exit_status_says_how_the_proof_ended(monkeypatch: pytest.MonkeyPatch, status: int, code: ExitCode) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, status))
    assert main(["doctor", "--prove"]) == code


def test_without_the_broker_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["doctor", "--prove"]) == ExitCode.USAGE
    assert "pip install 'weight-broker[broker]'" in capsys.readouterr().err
