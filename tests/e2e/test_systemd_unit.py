"""What can be known about deploy/systemd without starting it: systemd's own tools accept it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from configparser import ConfigParser, SectionProxy
from dataclasses import asdict
from pathlib import Path

import pytest

from weight_brokerd.config.loading import Config

SYSTEMD_DIRECTORY = Path(__file__).parents[2] / "deploy" / "systemd"
SYSTEM_UNITS = Path("/usr/lib/systemd/system")
DROP_INS = ("hardening-strict.conf", "npu.conf", "cuda.conf")

pytestmark = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None or not SYSTEM_UNITS.is_dir(), reason="systemd is not installed"
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory that looks like the root of a host on which the unit file and the program are installed."""
    (tmp_path / "usr/lib/systemd").mkdir(parents=True)
    shutil.copytree(SYSTEM_UNITS, tmp_path / "usr/lib/systemd/system", symlinks=True)
    (tmp_path / "lib").symlink_to("usr/lib")
    for name in ("opt/weight-broker/bin/weight-brokerd", "bin/kill"):
        program = tmp_path / name
        program.parent.mkdir(parents=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    units = tmp_path / "etc/systemd/system"
    units.mkdir(parents=True)
    shutil.copy(SYSTEMD_DIRECTORY / "weight-broker.service", units)
    return tmp_path


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def install_drop_in(root: Path, name: str) -> None:
    directory = root / "etc/systemd/system/weight-broker.service.d"
    directory.mkdir(exist_ok=True)
    shutil.copy(SYSTEMD_DIRECTORY / name, directory)


def verify(root: Path) -> subprocess.CompletedProcess[str]:
    return run("systemd-analyze", "verify", f"--root={root}", "--recursive-errors=yes", "weight-broker.service")


def exposure_is_at_most(threshold: int, root: Path) -> bool:
    """`threshold` is ten times the number that `systemd-analyze security` prints."""
    result = run(
        "systemd-analyze",
        "security",
        f"--root={root}",
        "--offline=yes",
        f"--threshold={threshold}",
        "weight-broker.service",
    )
    return result.returncode == 0


def service_settings() -> SectionProxy:
    parser = ConfigParser(interpolation=None)
    parser.read(SYSTEMD_DIRECTORY / "weight-broker.service")
    return parser["Service"]


@pytest.mark.parametrize("drop_in", [None, *DROP_INS])
def test_systemd_accepts_the_unit_without_a_warning(root: Path, drop_in: str | None) -> None:
    if drop_in is not None:
        install_drop_in(root, drop_in)
    result = verify(root)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_the_check_notices_a_misspelt_setting(root: Path) -> None:
    unit = root / "etc/systemd/system/weight-broker.service"
    unit.write_text(unit.read_text().replace("WatchdogSec=", "WatchdogSeconds="))
    assert verify(root).returncode != 0


def test_the_check_notices_a_missing_program(root: Path) -> None:
    (root / "opt/weight-broker/bin/weight-brokerd").unlink()
    assert verify(root).returncode != 0


@pytest.mark.parametrize(
    ("drop_in", "threshold"), [(None, 33), ("hardening-strict.conf", 20), ("npu.conf", 38), ("cuda.conf", 36)]
)
def test_the_exposure_stays_within_its_limit(root: Path, drop_in: str | None, threshold: int) -> None:
    if drop_in is not None:
        install_drop_in(root, drop_in)
    assert exposure_is_at_most(threshold, root)
    assert not exposure_is_at_most(threshold - 5, root), "the limit can be lowered"


MAKE_A_MOUNT_NAMESPACE = {
    "ProtectSystem": "no",
    "ProtectHome": "no",
    "PrivateTmp": "no",
    "PrivateDevices": "no",
    "PrivateIPC": "no",
    "PrivateMounts": "no",
    "ProtectKernelTunables": "no",
    "ProtectKernelModules": "no",
    "ProtectKernelLogs": "no",
    "ProtectControlGroups": "no",
    "ProtectProc": "default",
}
"""Directives of hardening, with the value that leaves the service in the mount namespace of the host."""
PATHS = re.compile(
    r"(Root|ReadOnly|ReadWrite|Inaccessible|Exec|NoExec|Bind(ReadOnly)?|Mount|Extension)(Paths|Directory|Directories|Image"
    r"|Images|Flags)$|(TemporaryFileSystem|ProcSubset|DynamicUser|LogNamespace|PrivatePIDs)$"
)
"""Directives that make a mount namespace whatever their value is."""


def settings_in(name: str) -> list[tuple[str, str]]:
    lines = (SYSTEMD_DIRECTORY / name).read_text().splitlines()
    return [(key, value) for key, _, value in (line.partition("=") for line in lines) if value and key[0] != "#"]


def test_the_broker_of_ascend_hosts_stays_in_the_mount_namespace_of_the_host() -> None:
    settings = dict(settings_in("npu.conf"))
    assert {name: settings.get(name) for name in MAKE_A_MOUNT_NAMESPACE} == MAKE_A_MOUNT_NAMESPACE
    named = [name for file in ("weight-broker.service", "npu.conf") for name, _ in settings_in(file)]
    assert [name for name in named if PATHS.match(name)] == []


def test_it_is_known_of_every_hardening_of_the_unit_whether_it_makes_a_mount_namespace() -> None:
    harmless = {"ProtectClock", "ProtectHostname"}
    names = {name for name, _ in settings_in("weight-broker.service") if name.startswith(("Protect", "Private"))}
    assert names - harmless <= MAKE_A_MOUNT_NAMESPACE.keys()


def test_the_device_groups_of_ascends_driver_are_allowed_by_their_names_in_proc_devices() -> None:
    allowed = {value for name, value in settings_in("npu.conf") if name == "DeviceAllow"}
    assert {"char-devdrv-cdev rw", "char-hisi_davinci_intf rw", "char-davinci rw"} <= allowed
    assert not [value for value in allowed if re.search(r"/dev/davinci\d", value)], "every card, not some"


def test_cann_finds_itself_and_logs_below_the_state_directory() -> None:
    settings = settings_in("npu.conf")
    assert ("Environment", "ASCEND_HOME_PATH=/usr/local/Ascend/ascend-toolkit/latest") in settings
    assert ("Environment", "ASCEND_PROCESS_LOG_PATH=%S/weight-broker/ascend") in settings
    assert ("SupplementaryGroups", "HwHiAiUser") in settings


def test_stopping_takes_longer_than_draining() -> None:
    stop_seconds = float(service_settings()["TimeoutStopSec"].removesuffix("s"))
    assert Config().limits.drain_seconds + 10 <= stop_seconds


def test_the_example_configuration_shows_every_setting_with_its_default() -> None:
    text = (SYSTEMD_DIRECTORY / "broker.toml").read_text()
    shown = tomllib.loads(re.sub(r"^#(?=[a-z_]+ = )", "", text, flags=re.MULTILINE))
    # The one setting that the example does set, to the group that sysusers makes.
    assert shown["broker"].pop("admin_group") == "weight-broker-admins"
    expected = json.loads(json.dumps(asdict(Config())))  # a list is a list
    del expected["broker"]["admin_group"]
    assert shown == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="systemd-sysusers and systemd-tmpfiles change owners, which needs root")
def test_sysusers_and_tmpfiles_make_the_users_and_the_runtime_directory(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    for tool, file in (
        ("systemd-sysusers", "weight-broker.sysusers.conf"),
        ("systemd-tmpfiles", "weight-broker.tmpfiles.conf"),
    ):
        arguments = ["--create"] if tool == "systemd-tmpfiles" else []
        result = run(tool, f"--root={tmp_path}", *arguments, SYSTEMD_DIRECTORY / file)
        assert result.returncode == 0, result.stderr

    users = {line.split(":")[0]: line.split(":") for line in (tmp_path / "etc/passwd").read_text().splitlines()}
    groups = {line.split(":")[0]: line.split(":") for line in (tmp_path / "etc/group").read_text().splitlines()}
    assert users["weight-broker"][6] == "/usr/sbin/nologin"
    assert set(groups) == {"weight-broker", "weight-broker-clients", "weight-broker-admins"}

    directory = (tmp_path / "run/weight-broker").stat()
    assert directory.st_mode & 0o7777 == 0o750
    assert directory.st_uid == int(users["weight-broker"][2])
    assert directory.st_gid == int(groups["weight-broker-clients"][2])


def test_the_unit_and_the_files_beside_it_name_the_same_user_group_and_directory() -> None:
    service = service_settings()
    sysusers = (SYSTEMD_DIRECTORY / "weight-broker.sysusers.conf").read_text()
    directory = (
        f"/run/{service['RuntimeDirectory']} {service['RuntimeDirectoryMode']} {service['User']} {service['Group']}"
    )
    assert directory in (SYSTEMD_DIRECTORY / "weight-broker.tmpfiles.conf").read_text()
    assert f"\nu     {service['User']} " in sysusers
    assert f"\ng     {service['Group']} " in sysusers
