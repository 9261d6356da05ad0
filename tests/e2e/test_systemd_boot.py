"""deploy/systemd under a real systemd as PID 1: what an operator relies on.

One boot (systemd_scenario.py) installs the unit as its header says, starts it, uses it, freezes it, restarts it and
stops it. The unit file is the shipped one; a drop-in shortens the watchdog and writes the log to a file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from e2e import private_systemd

OBSTACLE = private_systemd.why_not()

pytestmark = [
    pytest.mark.systemd,
    pytest.mark.skipif(OBSTACLE is not None, reason=f"no private systemd: {OBSTACLE}"),
]

CLEAN_STOP = {"ActiveState": "inactive", "Result": "success", "ExecMainStatus": "0"}
ACQUIRED = {"equal": True, "size_bytes": 400_000}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("systemd")


@pytest.fixture(scope="module")
def seen(work: Path) -> dict[str, Any]:
    observed: dict[str, Any] = json.loads(private_systemd.run_scenario("systemd_scenario.py", work, timeout=170))
    assert observed["completed"], private_systemd.logs(work)
    return observed


def test_the_unit_is_enabled_and_active_once_the_broker_says_it_is_ready(seen: dict[str, Any]) -> None:
    started = seen["started"]
    assert (started["ActiveState"], started["SubState"], started["UnitFileState"]) == ("active", "running", "enabled")


def test_systemctl_status_shows_what_the_broker_does(seen: dict[str, Any]) -> None:
    assert seen["started"]["StatusText"].startswith("0 instances, 0 publications")
    assert seen["status_while_published"].startswith("1 instances, 1 publications")


def test_health_is_serving_on_the_unix_socket(seen: dict[str, Any]) -> None:
    assert seen["health"] == "SERVING"


def test_the_sockets_belong_to_the_clients_group_and_to_nobody_else(seen: dict[str, Any]) -> None:
    for socket in seen["sockets"].values():
        assert socket["socket"]
        assert (socket["user"], socket["group"], socket["mode"]) == ("weight-broker", "weight-broker-clients", "0o660")


def test_the_runtime_directory_is_the_same_before_the_start_and_after_it(seen: dict[str, Any]) -> None:
    directory = seen["runtime_directory"]
    assert (directory["user"], directory["group"], directory["mode"]) == (
        "weight-broker",
        "weight-broker-clients",
        "0o750",
    )
    assert directory == seen["runtime_directory_before_the_first_start"]


def test_members_of_the_clients_group_publish_and_acquire(seen: dict[str, Any]) -> None:
    assert seen["acquired"] == ACQUIRED


def test_other_users_cannot_attach(seen: dict[str, Any]) -> None:
    assert seen["stranger"]["error"] == "BrokerUnavailable"
    assert "no permission" in seen["stranger"]["message"]


def test_only_members_of_the_administrators_group_may_administer(seen: dict[str, Any]) -> None:
    assert seen["evict"] == {"inference": "PERMISSION_DENIED", "administrator": "NOT_FOUND"}


def test_a_frozen_broker_is_replaced_by_the_watchdog(seen: dict[str, Any]) -> None:
    assert seen["endings"] == ["watchdog"]
    assert seen["after_watchdog"]["NRestarts"] == "1"
    assert seen["health_after_watchdog"] == "SERVING"


def test_a_frozen_broker_leaves_the_stack_it_was_frozen_in(seen: dict[str, Any]) -> None:
    assert "(most recent call first)" in seen["log_of_the_frozen"]


def test_publications_are_back_after_the_watchdog_without_the_instance_doing_anything(seen: dict[str, Any]) -> None:
    assert seen["republished"]


def test_restarts_keep_the_runtime_directory_that_containers_have_mounted(seen: dict[str, Any]) -> None:
    assert seen["health_after_restart"] == "SERVING"
    assert seen["runtime_directory_after_restarts"] == seen["runtime_directory"]


def test_a_stop_is_clean_and_leaves_nothing_behind(seen: dict[str, Any]) -> None:
    assert CLEAN_STOP.items() <= seen["stopped"].items()
    assert seen["runtime_directory_after_stop"] is None


def test_the_broker_works_under_the_strict_hardening(seen: dict[str, Any]) -> None:
    strict = seen["drop_ins"]["hardening-strict.conf"]
    assert "MemoryDenyWriteExecute=yes" in strict["properties"]
    assert (strict["health"], strict["acquired"]) == ("SERVING", ACQUIRED)
    assert CLEAN_STOP.items() <= strict["stopped"].items()


def test_the_broker_works_with_the_device_settings_and_belongs_to_the_devices_group(seen: dict[str, Any]) -> None:
    npu = seen["drop_ins"]["npu.conf"]
    assert "HwHiAiUser" in npu["groups"]
    assert "HwHiAiUser" not in seen["drop_ins"]["hardening-strict.conf"]["groups"]
    assert (npu["health"], npu["acquired"]) == ("SERVING", ACQUIRED)
    assert CLEAN_STOP.items() <= npu["stopped"].items()


def test_with_the_device_settings_the_owner_of_a_lent_staging_buffer_outlives_a_killed_broker(
    seen: dict[str, Any],
) -> None:
    assert seen["drop_ins"]["npu.conf"]["outlives_the_broker"]
    assert not seen["drop_ins"]["hardening-strict.conf"]["outlives_the_broker"]


def test_without_the_device_settings_the_hardening_makes_a_mount_namespace(seen: dict[str, Any]) -> None:
    assert seen["mount_namespaces"]["broker"] != seen["mount_namespaces"]["systemd"]
    strict = seen["drop_ins"]["hardening-strict.conf"]
    assert strict["mount_namespace"] != seen["mount_namespaces"]["systemd"]


def test_with_the_device_settings_the_broker_is_in_the_mount_namespace_of_the_first_process(
    seen: dict[str, Any],
) -> None:
    assert seen["drop_ins"]["npu.conf"]["mount_namespace"] == seen["mount_namespaces"]["systemd"]


def test_a_reload_is_heard_and_the_log_is_one_json_object_a_line(seen: dict[str, Any]) -> None:
    events = [json.loads(line)["event"] for line in seen["log"]]
    assert events[0] == "ready"
    assert "reloaded" in events


def test_a_wrong_configuration_fails_at_once_and_is_not_tried_again(seen: dict[str, Any]) -> None:
    misconfigured = seen["misconfigured"]
    assert (misconfigured["ActiveState"], misconfigured["ExecMainStatus"]) == ("failed", "2")
    assert misconfigured["NRestarts"] == "0"
