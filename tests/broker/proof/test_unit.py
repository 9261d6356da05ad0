"""The proof is run as the broker's unit runs the broker."""

from __future__ import annotations

from pathlib import Path

import pytest

from weight_brokerd.proof import unit

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
