"""Why memory of a GPU cannot be opened: what sets its exporter apart from the broker."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from weight_brokerd.cards.child.separation import INVALID_CONTEXT, why_not_opened
from weight_brokerd.cards.messages import ImportRegion

MAP_FAILED = 205
PID = 77


def region(pid: int, uid: int | None = None) -> ImportRegion:
    exporter = os.geteuid() if uid is None else uid
    return ImportRegion("region", 4096, ipc_handle="00", exporter_pid=pid, exporter_uid=exporter)


def process(root: Path, name: str, *, namespace: str = "", numbers: str = "") -> None:
    (root / name / "ns").mkdir(parents=True)
    if namespace:
        (root / name / "ns" / "pid").symlink_to(namespace)
    (root / name / "status").write_text(f"Name:\tpython\nNSpid:\t{numbers}\n")


def test_pid_namespaces_are_compared(tmp_path: Path) -> None:
    process(tmp_path, "self", namespace="pid:[1]")
    process(tmp_path, str(PID), namespace="pid:[2]")
    why = why_not_opened(region(PID), INVALID_CONTEXT, processes=tmp_path)
    assert f"process {PID}" in why
    assert "pid namespaces" in why


def test_a_process_that_cannot_be_seen_is_in_another_one() -> None:
    assert "cannot see" in why_not_opened(region(0), INVALID_CONTEXT)


@pytest.mark.parametrize(("numbers", "is_apart"), [("77", False), ("77\t1", True)])
def test_without_the_right_to_look_the_numbers_of_the_process_tell(
    tmp_path: Path, numbers: str, is_apart: bool
) -> None:
    process(tmp_path, "self", namespace="pid:[1]", numbers="5")
    process(tmp_path, str(PID), numbers=numbers)
    assert bool(why_not_opened(region(PID), INVALID_CONTEXT, processes=tmp_path)) == is_apart


def test_nothing_is_said_of_a_process_that_has_ended(tmp_path: Path) -> None:
    process(tmp_path, "self", namespace="pid:[1]", numbers="5")
    assert why_not_opened(region(PID), INVALID_CONTEXT, processes=tmp_path) == ""


@pytest.mark.parametrize("code", [INVALID_CONTEXT, MAP_FAILED])
def test_users_are_compared_whichever_code_the_driver_has_for_it(code: int) -> None:
    why = why_not_opened(region(os.getpid(), os.geteuid() + 1), code)
    assert f"uid {os.geteuid() + 1} and the broker as uid {os.geteuid()}" in why


def test_nothing_is_said_of_a_process_beside_the_broker() -> None:
    assert why_not_opened(region(os.getpid()), INVALID_CONTEXT) == ""


def test_nothing_is_said_of_an_exporter_that_is_not_known() -> None:
    assert why_not_opened(ImportRegion("region", 4096, exporter_uid=-1), MAP_FAILED) == ""
