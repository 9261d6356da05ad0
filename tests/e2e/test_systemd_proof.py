"""`weight-broker doctor --prove --as-unit` under a real systemd as PID 1: the proof may do what the broker may do.

One boot (proof_scenario.py) runs the proof on the double of Ascend's driver: with the unit and npu.conf, and with the
unit alone, whose hardening the driver takes for a container.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from doubles.cann.build import CannotBuild, build
from e2e import private_systemd
from support.datasystem_worker import require_wheel

DBUS = Path("/usr/bin/dbus-daemon")
OBSTACLE = private_systemd.why_not() or (None if DBUS.exists() else f"{DBUS} is missing, which systemd-run needs")

pytestmark = [
    pytest.mark.systemd,
    pytest.mark.timeout(900),
    pytest.mark.skipif(OBSTACLE is not None, reason=f"no private systemd: {OBSTACLE}"),
]
NEEDS_ANOTHER_MOUNT_NAMESPACE = {"O1", "O2", "O3"}
NEEDS_ROOT = {"H6.alone"}
NEEDS_TORCH_NPU = {"P14.plain", "P14.expandable", "P14.huge"}
NEEDS_A_NEWER_RELEASE = {"P9.range"}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    require_wheel()
    try:
        libraries = build().libraries
    except CannotBuild as error:
        pytest.skip(str(error))
    work = tmp_path_factory.mktemp("systemd")
    work.chmod(0o755)  # users of the private system read it
    shutil.copytree(libraries, work / "double", symlinks=True)
    (work / "double").chmod(0o755)
    observed: dict[str, Any] = json.loads(private_systemd.run_scenario("proof_scenario.py", work, timeout=800))
    assert observed["completed"], private_systemd.logs(work)
    return observed


def of(proof: dict[str, Any], verdict: str) -> set[str]:
    return {identity for identity, (found, _) in proof["rows"].items() if found == verdict}


def test_rows_run_in_the_mount_namespace_of_the_first_process_as_the_broker_does(seen: dict[str, Any]) -> None:
    assert seen["broker"]["facts"]["mount_namespace"] == seen["systemd"]
    assert seen["with_npu_conf"]["facts"]["mount_namespace"] == seen["systemd"]


def test_rows_have_the_brokers_user_groups_capabilities_and_filters(seen: dict[str, Any]) -> None:
    proof = seen["with_npu_conf"]
    assert proof["facts"] == seen["broker"]["facts"]
    assert proof["facts"]["Uid"][0] != "0"
    assert (proof["facts"]["NoNewPrivs"], proof["facts"]["Seccomp"]) == (["1"], ["2"])


def test_the_proofs_unit_has_the_settings_of_the_brokers(seen: dict[str, Any]) -> None:
    properties = seen["with_npu_conf"]["properties"]
    assert properties == seen["broker"]["properties"]
    assert {"DevicePolicy=closed", "DeviceAllow=char-devdrv-cdev rw", "SupplementaryGroups=HwHiAiUser"} <= set(
        properties
    )


def test_the_driver_keeps_its_contract_in_the_unit_and_what_is_not_allowed_there_is_not_run(
    seen: dict[str, Any],
) -> None:
    proof = seen["with_npu_conf"]
    assert proof["exit_status"] == 0
    assert of(proof, "unlike_source") == set()
    assert of(proof, "not_run") == (
        NEEDS_ANOTHER_MOUNT_NAMESPACE | NEEDS_ROOT | NEEDS_TORCH_NPU | NEEDS_A_NEWER_RELEASE
    )  # fmt: skip


def test_a_unit_in_the_hosts_mount_namespace_has_its_cards_beside_an_engines_container(seen: dict[str, Any]) -> None:
    assert seen["engine"] == 0
    assert of(seen["with_npu_conf_beside_an_engine"], "as_source") == {"M1"}


def test_the_proof_in_a_hardened_unit_shows_that_the_driver_takes_it_for_a_container(seen: dict[str, Any]) -> None:
    proof = seen["hardened_beside_an_engine"]
    assert proof["facts"]["mount_namespace"] != seen["systemd"]
    verdict, said = proof["rows"]["M1"]
    assert verdict == "not_run"
    assert "Conflict open udevid 0" in said["value"]
