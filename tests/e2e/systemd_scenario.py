"""What an operator does with the unit, from installation to removal, under a real systemd (private_systemd.py).

Runs inside the private system as root and writes down what it sees; tests/e2e/test_systemd_boot.py judges it.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

UNIT = "weight-broker.service"
PROPERTIES = "ActiveState,SubState,Result,ExecMainStatus,StatusText,MainPID,NRestarts,UnitFileState"
PYTHON = "/opt/weight-broker/bin/python"
SOURCE = Path("/opt/weight-broker/source")
CLIENT = SOURCE / "tests/e2e/systemd_client.py"
DROP_INS = Path("/etc/systemd/system/weight-broker.service.d")
RUNTIME_DIRECTORY = Path("/run/weight-broker")
WATCHDOG_SECONDS = 2

# Only what a test needs: the watchdog in seconds, as many starts as it likes, a log without a journal, and how each
# process of the service ended.
LOG = Path("/run/private-systemd/broker.log")
ENDINGS = Path("/run/endings")
TEST_DROP_IN = f"""[Unit]
StartLimitIntervalSec=0
[Service]
WatchdogSec={WATCHDOG_SECONDS}s
StandardError=append:{LOG}
ExecStopPost=+/bin/sh -c 'echo $SERVICE_RESULT >> {ENDINGS}'
"""


def run(*command: str | Path) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=True).stdout


def install() -> None:
    """The steps at the top of weight-broker.service, the virtual environment aside, and three users."""
    deploy = SOURCE / "deploy/systemd"
    for name, target in (
        ("weight-broker.sysusers.conf", "/etc/sysusers.d/weight-broker.conf"),
        ("weight-broker.tmpfiles.conf", "/etc/tmpfiles.d/weight-broker.conf"),
        ("broker.toml", "/etc/weight-broker/broker.toml"),
        (UNIT, f"/etc/systemd/system/{UNIT}"),
    ):
        run("install", "-D", "--mode=644", deploy / name, target)
    DROP_INS.mkdir()
    (DROP_INS / "test.conf").write_text(TEST_DROP_IN)
    run("systemd-sysusers", "/etc/sysusers.d/weight-broker.conf")
    run("systemd-tmpfiles", "--create", "/etc/tmpfiles.d/weight-broker.conf")
    run(
        "systemd-sysusers",
        "--inline",
        *("u inference -", "m inference weight-broker-clients", "u stranger -"),
        *("u administrator -", "m administrator weight-broker-clients", "m administrator weight-broker-admins"),
    )
    run("systemctl", "daemon-reload")


def state() -> dict[str, str]:
    lines = run("systemctl", "show", UNIT, f"--property={PROPERTIES}").splitlines()
    return dict(line.split("=", 1) for line in lines)


def describe(path: Path) -> dict[str, object] | None:
    """Owner, group and mode of `path`; None if it does not exist."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return {
        "user": pwd.getpwuid(status.st_uid).pw_name,
        "group": grp.getgrgid(status.st_gid).gr_name,
        "mode": oct(stat.S_IMODE(status.st_mode)),
        "socket": stat.S_ISSOCK(status.st_mode),
        "inode": status.st_ino,
    }


def health() -> str:
    """What grpc.health.v1 says about the whole broker."""
    with grpc.insecure_channel(f"unix:{RUNTIME_DIRECTORY / 'broker.sock'}") as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        answer = check(health_pb2.HealthCheckRequest(), timeout=60, wait_for_ready=True)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def client_command(user: str, action: str) -> list[str]:
    environment = ["env", "--ignore-environment", "PATH=/usr/bin:/bin"]
    if user == "stranger":  # who would otherwise not look where it may not enter
        environment.append(f"WEIGHT_BROKER_RUNTIME_DIRECTORY={RUNTIME_DIRECTORY}")
    drop = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "--inh-caps=-all"]
    return [*drop, *environment, PYTHON, "-B", "-P", str(CLIENT), action]


def act(user: str, action: str) -> Any:
    return json.loads(run(*client_command(user, action)).splitlines()[-1])


@contextmanager
def published() -> Iterator[None]:
    """An instance that has published and lives."""
    publisher = subprocess.Popen(
        client_command("inference", "publish"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert publisher.stdout is not None
    try:
        assert (said := publisher.stdout.readline()) == '"published"\n', said
        yield
    finally:
        rest, _ = publisher.communicate(timeout=30)
    assert rest == '"retracted"\n', rest


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Whether `condition` came to hold."""
    deadline = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds


def observe(seen: dict[str, object]) -> None:
    install()
    seen["runtime_directory_before_the_first_start"] = describe(RUNTIME_DIRECTORY)
    run("systemctl", "enable", "--quiet", UNIT)
    run("systemctl", "start", UNIT)
    seen["started"] = state()
    seen["mount_namespaces"] = {
        "systemd": mount_namespace("1"),
        "broker": mount_namespace(state()["MainPID"]),
    }
    seen["health"] = health()
    seen["runtime_directory"] = describe(RUNTIME_DIRECTORY)
    seen["sockets"] = {name: describe(RUNTIME_DIRECTORY / name) for name in ("broker.sock", "attach.sock")}
    seen["stranger"] = act("stranger", "acquire")
    seen["evict"] = {user: act(user, "evict") for user in ("inference", "administrator")}

    with published():
        seen["acquired"] = act("inference", "acquire")
        wait_for(lambda: state()["StatusText"].startswith("1 instances, 1 publications"))
        seen["status_while_published"] = state()["StatusText"]
        run("systemctl", "reload", UNIT)
        wait_for(lambda: '"reloaded"' in LOG.read_text())
        seen["log"] = LOG.read_text().splitlines()
        freeze(seen)

    run("systemctl", "restart", UNIT)
    seen["health_after_restart"] = health()
    seen["runtime_directory_after_restarts"] = describe(RUNTIME_DIRECTORY)

    run("systemctl", "stop", UNIT)
    seen["stopped"] = state()
    seen["runtime_directory_after_stop"] = describe(RUNTIME_DIRECTORY)

    run("systemd-sysusers", "--inline", "g HwHiAiUser -")  # as the device driver's installer does
    seen["drop_ins"] = {name: run_with_drop_in(name) for name in ("hardening-strict.conf", "npu.conf")}
    seen["misconfigured"] = start_misconfigured()


def freeze(seen: dict[str, object]) -> None:
    """Stops the broker's process without ending it, and waits for systemd to notice and for the instances to return."""
    frozen = state()["MainPID"]
    run("systemctl", "kill", "--signal=STOP", UNIT)
    wait_for(lambda: state()["MainPID"] != frozen and state()["SubState"] == "running", WATCHDOG_SECONDS + 60)
    seen["after_watchdog"] = state()
    seen["endings"] = ENDINGS.read_text().split()
    seen["log_of_the_frozen"] = LOG.read_text()
    seen["health_after_watchdog"] = health()
    seen["republished"] = wait_for(lambda: "error" not in act("inference", "acquire"))


def run_with_drop_in(name: str) -> dict[str, object]:
    shutil.copy(SOURCE / "deploy/systemd" / name, DROP_INS)
    run("systemctl", "daemon-reload")
    run("systemctl", "start", UNIT)
    process = state()["MainPID"]
    result: dict[str, object] = {"health": health(), "groups": groups_of(process)}
    result["mount_namespace"] = mount_namespace(process)
    result["properties"] = run("systemctl", "show", UNIT, "--property=MemoryDenyWriteExecute,DevicePolicy").split()
    with published():
        result["acquired"] = act("inference", "acquire")
    result["outlives_the_broker"] = outlives_the_broker()
    run("systemctl", "stop", UNIT)
    result["stopped"] = state()
    (DROP_INS / name).unlink()
    return result


def outlives_the_broker() -> bool:
    """Whether another process of the unit lives on while a broker that was killed is started again."""
    killed = state()["MainPID"]
    with subprocess.Popen(["sleep", "infinity"]) as other:
        try:
            (control_group_of(killed) / "cgroup.procs").write_text(str(other.pid))
            run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", UNIT)
            assert wait_for(lambda: state()["MainPID"] not in ("0", killed) and state()["SubState"] == "running")
            return other.poll() is None
        finally:
            other.kill()


def control_group_of(process: str) -> Path:
    """Where systemd keeps the unit's processes, in version 2 or in version 1's name=systemd."""
    group = run("systemctl", "show", UNIT, "--property=ControlGroup", "--value").strip()
    roots = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd")
    paths = [Path(root + group) for root in roots if Path(root + group, "cgroup.procs").exists()]
    return next(path for path in paths if process in (path / "cgroup.procs").read_text().split())


def mount_namespace(process: str) -> str:
    return os.readlink(f"/proc/{process}/ns/mnt")


def groups_of(process: str) -> list[str]:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("Groups:"):
            return sorted(grp.getgrgid(int(group)).gr_name for group in line.split()[1:])
    return []


def start_misconfigured() -> dict[str, str]:
    (DROP_INS / "wrong.conf").write_text("[Service]\nEnvironment=WEIGHT_BROKER_LIMITS_INSTANCES=none\n")
    run("systemctl", "daemon-reload")
    subprocess.run(["systemctl", "start", UNIT], stderr=subprocess.DEVNULL, timeout=60, check=False)
    time.sleep(1)  # five times RestartSec=
    return state()


def write_what_is_seen(observe: Callable[[dict[str, object]], None]) -> None:
    """Writes it even if a step fails; `completed` is false then."""
    seen: dict[str, object] = {"completed": False}
    try:
        observe(seen)
        seen["completed"] = True
    except subprocess.CalledProcessError:
        subprocess.run(["systemctl", "--no-pager", "status", UNIT], check=False)
        raise
    finally:
        unfinished = Path(sys.argv[1] + ".part")
        unfinished.write_text(json.dumps(seen, indent=1))
        os.replace(unfinished, sys.argv[1])


if __name__ == "__main__":
    write_what_is_seen(observe)
