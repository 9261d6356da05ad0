"""What the doctor says of Ascend's driver and of the ports of HCCL."""

from __future__ import annotations

from pathlib import Path

import pytest

from weight_broker.cli.doctor import ascend_driver
from weight_broker.cli.doctor.findings import Verdict

AUTO = dict.fromkeys(ascend_driver.PORTS, "auto")


@pytest.mark.parametrize("name", ["devdrv-cdev", "davinci"])
def test_the_groups_of_the_unit_are_found(tmp_path: Path, name: str) -> None:
    (tmp_path / "devices").write_text(f"Character devices:\n  1 mem\n236 {name}\n\nBlock devices:\n  8 sd\n")
    [finding] = ascend_driver.groups(tmp_path / "devices")
    assert finding.verdict is Verdict.OK
    assert name in finding.found


def test_a_driver_with_other_groups_needs_another_line_in_the_unit(tmp_path: Path) -> None:
    (tmp_path / "devices").write_text("Character devices:\n  1 mem\n")
    [finding] = ascend_driver.groups(tmp_path / "devices")
    assert finding.verdict is Verdict.WARNING
    assert "DeviceAllow=char-" in finding.fix


def test_numbers_that_differ_are_a_problem_and_go_into_a_report() -> None:
    finding = ascend_driver.numbers({"number": 0, "in_key": 3})
    assert finding.verdict is Verdict.PROBLEM
    assert "--prove" in finding.fix
    assert ascend_driver.numbers({"number": 3, "in_key": 3}).verdict is Verdict.OK


def test_a_card_that_cannot_be_asked_is_no_proof_of_anything() -> None:
    finding = ascend_driver.numbers({"problem": "aclrtSetDevice failed"})
    assert finding.verdict is Verdict.WARNING
    assert "aclrtSetDevice failed" in finding.found


def test_default_ports_are_a_warning_that_names_what_to_set() -> None:
    [finding] = ascend_driver.ports("vllm", {ascend_driver.PORTS[0]: "auto"})
    assert finding.verdict is Verdict.WARNING
    assert "HCCL_HOST_SOCKET_PORT_RANGE=auto" in finding.fix
    assert "HCCL_NPU_SOCKET_PORT_RANGE" not in finding.fix
    [finding] = ascend_driver.ports("vllm", AUTO)
    assert finding.verdict is Verdict.OK
