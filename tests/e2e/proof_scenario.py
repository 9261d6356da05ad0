"""The proof as the broker's unit runs the broker, under a real systemd (private_systemd.py), on a double of the driver.

Runs inside the private system as root and writes down what it sees; tests/e2e/test_systemd_proof.py judges it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from e2e.systemd_scenario import (
    DROP_INS,
    SOURCE,
    UNIT,
    install,
    mount_namespace,
    run,
    state,
    wait_for,
    write_what_is_seen,
)
from weight_brokerd.ascend_check.contract.driver import NULL, DriverProcess, i32
from weight_brokerd.ascend_check.contract.machine.costs import BYTES_VARIABLE

INSIDE = Path("/run/private-systemd")
DOUBLE, HOST = INSIDE / "double", INSIDE / "host"
PROOF_UNIT = "weight-broker-proof.service"
CARDS = 3
BYTES = 16 << 20
UNIT_FILE, NPU = SOURCE / "deploy/systemd" / UNIT, SOURCE / "deploy/systemd/npu.conf"
PYTHON = ("/opt/weight-broker/bin/python", "-B", "-P", "-m")
CONTAINER = (
    "unshare", "--mount",
    "setpriv", "--reuid=inference", "--regid=inference", "--init-groups", "--inh-caps=-all",
)  # fmt: skip
BUS_SOCKET = """[Unit]
DefaultDependencies=no
[Socket]
ListenStream=/run/dbus/system_bus_socket
"""
BUS_SERVICE = """[Unit]
DefaultDependencies=no
Requires=dbus.socket
[Service]
Type=notify
ExecStart=/usr/bin/dbus-daemon --system --address=systemd: --nofork --nopidfile --systemd-activation
"""
STATUS = ("Uid", "Gid", "Groups", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp")
PROPERTIES = (
    "User,Group,SupplementaryGroups,DevicePolicy,DeviceAllow,PrivateDevices,ProtectSystem,RestrictNamespaces,"
    "SystemCallFilter,CapabilityBoundingSet,RestrictAddressFamilies,LimitMEMLOCK,UMask"
)


def start_bus() -> None:
    """systemd-run waits for a unit by way of the bus."""
    units = Path("/etc/systemd/system")
    (units / "dbus.socket").write_text(BUS_SOCKET)
    (units / "dbus.service").write_text(BUS_SERVICE)
    run("systemctl", "daemon-reload")
    run("systemctl", "start", "dbus.service")


def emulate() -> dict[str, str]:
    """A host with cards; the variables of a process on it."""
    (HOST / "processes").mkdir(parents=True)
    (HOST / "board").touch()
    for path, mode in ((HOST, 0o777), (HOST / "processes", 0o777), (HOST / "board", 0o666)):
        path.chmod(mode)
    (HOST / "host_mount_namespace").write_text(f"{os.stat('/proc/1/ns/mnt').st_ino}\n")
    return {
        "LD_LIBRARY_PATH": str(DOUBLE),
        "WEIGHT_BROKER_CARDS_LIBRARY_PATH": str(DOUBLE),
        "WEIGHT_BROKER_CARDS_PRELOAD": str(DOUBLE / "preload.so"),
        "CANN_DOUBLE_STATE": str(HOST),
        "CANN_DOUBLE_CARDS": str(CARDS),
        "CANN_DOUBLE_CARD_BYTES": str(4 << 30),
        BYTES_VARIABLE: str(BYTES),
    }


def write_drop_in(variables: Mapping[str, str]) -> Path:
    """What makes a service run on the double."""
    file = INSIDE / "double.conf"
    file.write_text("[Service]\n" + "".join(f"Environment={name}={value}\n" for name, value in variables.items()))
    return file


def facts(process: str) -> dict[str, object]:
    """What the kernel lets a process do."""
    lines = (line.partition(":") for line in Path(f"/proc/{process}/status").read_text().splitlines())
    found = {name: value.split() for name, _, value in lines if name in STATUS}
    return {"mount_namespace": mount_namespace(process), **found}


def properties(unit: str) -> list[str]:
    return sorted(run("systemctl", "show", unit, f"--property={PROPERTIES}").splitlines())


def caller_of_the_driver() -> str | None:
    """A process of a row that runs now."""
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and b"ascend_check.contract.worker" in (process / "cmdline").read_bytes():
                return process.name
        except OSError:
            continue
    return None


def prove(name: str, command: Sequence[str | Path]) -> dict[str, object]:
    """Runs a proof that writes `name`.json, and looks at a process of a row on the way."""
    file = INSIDE / f"{name}.json"
    with (INSIDE / f"{name}.log").open("w") as log:
        proof = subprocess.Popen(command, stdout=log, stderr=log)
        seen: dict[str, object] = {}

        def looked() -> bool:
            if proof.poll() is not None:
                return True
            process = caller_of_the_driver()
            try:
                if process is not None:
                    seen.update(facts=facts(process), properties=properties(PROOF_UNIT))
            except (OSError, subprocess.CalledProcessError):  # the row has ended meanwhile
                return False
            return bool(seen)

        wait_for(looked)
        seen["exit_status"] = proof.wait(600)
    seen["rows"] = {row["id"]: (row["verdict"], row["seen"]) for row in json.loads(file.read_text())["rows"]}
    return seen


@contextmanager
def engine_in_a_container(variables: Mapping[str, str]) -> Iterator[int]:
    """A process in a mount namespace, not root, that has card 0 open; the driver's code."""
    environment = {**os.environ, **variables}
    process = DriverProcess(environment, lambda _name, _answer: None, wrapper=CONTAINER)
    try:
        process.code("aclInit", NULL)
        yield process.code("aclrtSetDevice", i32(0))
    finally:
        process.kill()


def proof_of_memory(name: str) -> list[str | Path]:
    """One row of the proof."""
    return [*PYTHON, "weight_brokerd.proof", "npu", "--rows", "M1", "--json", INSIDE / f"{name}.json", "--as-unit"]


def observe(seen: dict[str, object]) -> None:
    install()
    start_bus()
    run("systemd-sysusers", "--inline", "g HwHiAiUser -")  # as the device driver's installer does
    shutil.copy(NPU, DROP_INS)
    run("systemctl", "daemon-reload")
    run("systemctl", "start", UNIT)
    seen["systemd"] = mount_namespace("1")
    seen["broker"] = {"facts": facts(state()["MainPID"]), "properties": properties(UNIT)}
    run("systemctl", "stop", UNIT)

    variables = emulate()
    double = write_drop_in(variables)
    doctor: list[str | Path] = [
        *PYTHON,
        "weight_broker.cli.main",
        "doctor",
        "--prove",
        INSIDE / "npu.json",
        "--as-unit",
    ]
    seen["with_npu_conf"] = prove("npu", [*doctor, UNIT_FILE, NPU, double])
    with engine_in_a_container(variables) as code:
        seen["engine"] = code
        seen["with_npu_conf_beside_an_engine"] = prove("beside", [*proof_of_memory("beside"), UNIT_FILE, NPU, double])
        seen["hardened_beside_an_engine"] = prove("hardened", [*proof_of_memory("hardened"), UNIT_FILE, double])


if __name__ == "__main__":
    write_what_is_seen(observe)
