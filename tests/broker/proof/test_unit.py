"""The proof is run as the broker's unit runs the broker."""

from __future__ import annotations

from pathlib import Path

import pytest

from weight_brokerd.proof import unit
from weight_brokerd.proof.__main__ import main

DEPLOY = Path(__file__).parents[3] / "deploy/systemd"


@pytest.fixture
def installed() -> str:
    """The unit on an Ascend host."""
    return (DEPLOY / "weight-broker.service").read_text() + (DEPLOY / "npu.conf").read_text()


def test_what_confines_the_broker_confines_the_proof(installed: str) -> None:
    properties = unit.properties(installed)
    for expected in (
        "User=weight-broker",
        "Group=weight-broker-clients",
        "SupplementaryGroups=HwHiAiUser",
        "DevicePolicy=closed",
        "DeviceAllow=/dev/davinci_manager rw",
        "CapabilityBoundingSet=",
        "RestrictNamespaces=yes",
    ):
        assert expected in properties


def test_a_drop_in_comes_after_what_it_replaces(installed: str) -> None:
    devices = [line for line in unit.properties(installed) if line.startswith("PrivateDevices=")]
    assert devices == ["PrivateDevices=yes", "PrivateDevices=no"]


def test_the_brokers_life_and_directories_are_left_alone(installed: str) -> None:
    names = {line.partition("=")[0] for line in unit.properties(installed)}
    assert names & {"ExecStart", "Type", "Restart", "RuntimeDirectory", "StateDirectory", "WatchdogSec"} == set()


def test_only_the_service_section_counts_and_specifiers_are_expanded() -> None:
    text = (
        "[Unit]\nAfter=network.target\n[Service]\n# User=root\nEnvironment=A=%S/weight-broker\n[Install]\nWantedBy=a\n"
    )
    assert unit.properties(text) == ["Environment=A=/var/lib/weight-broker"]


def test_the_json_comes_through_the_pipe_and_ascends_variables_go_along(installed: str) -> None:
    environment = {"ASCEND_HOME_PATH": "/opt/cann", "SECRET": "no"}
    command = unit.command(installed, ["npu", "--json", "-"], environment)
    assert command[:4] == ["systemd-run", "--quiet", "--wait", "--pipe"]
    assert "--setenv=ASCEND_HOME_PATH=/opt/cann" in command
    assert command[-5:] == ["-m", "weight_brokerd.proof", "npu", "--json", "-"]
    assert not any("SECRET" in word for word in command)


def program(directory: Path, text: str) -> None:
    (directory / "systemd-run").write_text(f"#!/bin/sh\n{text}\n")
    (directory / "systemd-run").chmod(0o755)


def prove(tmp_path: Path) -> tuple[int, Path]:
    file = tmp_path / "unit.json"
    file.write_text("an earlier proof")
    return main(["npu", "--json", str(file), "--as-unit", str(DEPLOY / "weight-broker.service")]), file


def test_what_the_unit_writes_into_the_pipe_is_the_file_and_its_exit_status_the_proofs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    program(tmp_path, "echo '{}'; exit 1")
    status, file = prove(tmp_path)
    assert (status, file.read_text()) == (1, "{}\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("echo no bus >&2; exit 1", "systemd-run started nothing (exit status 1)"),
        (None, "there is no systemd-run here"),
    ],
)
def test_where_systemd_starts_nothing_nothing_is_proved_and_an_earlier_file_stays(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str | None,
    words: str,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if text is not None:
        program(tmp_path, text)
    status, file = prove(tmp_path)
    assert (status, file.read_text()) == (2, "an earlier proof")
    assert words in capsys.readouterr().err


def test_a_file_of_the_unit_that_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "no.service"
    assert main(["npu", "--json", str(tmp_path / "unit.json"), "--as-unit", str(missing)]) == 2
    assert f"--as-unit {missing}: No such file or directory" in capsys.readouterr().err
    assert not (tmp_path / "unit.json").exists()
