"""The doctor on who may open a card, in a /proc that is made for the purpose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from weight_broker.cli.doctor import occupation
from weight_broker.cli.doctor.findings import Finding, Verdict

HOST, OTHER = "mnt:[4026531841]", "mnt:[4026533000]"
FIRST_USER, OTHER_USER = "user:[4026531837]", "user:[4026533100]"
FIRST_PID, OTHER_PID = "pid:[4026531836]", "pid:[4026533200]"
ALL, NONE = "000001ffffffffff", "0000000000000000"
OVERLAY = "1 0 0:1 / / rw - overlay overlay rw\n"
DISK = "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"


class FakeProc:
    """A /proc with the kernel's own thread, whose mount namespace is the host's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.add("2", "kthreadd")
        (path / "sys/kernel").mkdir(parents=True)
        (path / "sys/kernel/cap_last_cap").write_text("40\n")
        self.add("self", "doctor")

    def add(
        self,
        process: str,
        name: str,
        *,
        namespace: str = HOST,
        user: str = FIRST_USER,
        capabilities: str = NONE,
        mounts: str = DISK,
        descriptors: Sequence[str] = (),
        pids: str = FIRST_PID,
    ) -> None:
        """A namespace that is "" cannot be read."""
        directory = self.path / process
        (directory / "ns").mkdir(parents=True, exist_ok=True)
        (directory / "fd").mkdir(exist_ok=True)
        (directory / "comm").write_text(f"{name}\n")
        (directory / "cmdline").write_text(f"/opt/bin/{name}\0--verbose\0")
        (directory / "status").write_text(f"Name:\t{name}\nCapEff:\t{capabilities}\n")
        (directory / "mountinfo").write_text(mounts)
        for kind, target in (("mnt", namespace), ("user", user), ("pid", pids)):
            (directory / "ns" / kind).unlink(missing_ok=True)
            if target:
                (directory / "ns" / kind).symlink_to(target)
        for number, target in enumerate(descriptors):
            (directory / "fd" / str(number)).symlink_to(target)

    def hide_the_host(self) -> None:
        """As for who is not root, or in another pid namespace."""
        (self.path / "2/ns/mnt").unlink()


@pytest.fixture
def proc(tmp_path: Path) -> FakeProc:
    return FakeProc(tmp_path)


def look(proc: FakeProc, pid: int = 10, smi: str = "no-such-program") -> dict[str, Finding]:
    return {finding.check: finding for finding in occupation.findings(pid, proc.path, smi)}


def npu_smi(directory: Path, output: str) -> str:
    program = directory / "npu-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\n")
    program.chmod(0o755)
    return str(program)


def test_a_broker_in_the_hosts_mount_namespace_is_fine(proc: FakeProc) -> None:
    proc.add("10", "weight-brokerd")
    assert look(proc)["mount namespace"].verdict is Verdict.OK


def test_a_broker_in_a_mount_namespace_counts_as_a_container(proc: FakeProc) -> None:
    proc.add("10", "weight-brokerd", namespace=OTHER)
    found = look(proc)["mount namespace"]
    assert found.verdict is Verdict.WARNING
    assert "the driver counts the broker (pid 10) as a container" in found.found
    assert "npu.conf" in found.fix
    assert "device-share" in found.fix


@pytest.mark.parametrize(
    ("capabilities", "user", "mounts", "counted"),
    [
        (ALL, FIRST_USER, DISK, False),
        (ALL, OTHER_USER, DISK, True),
        ("000001fffffeffff", FIRST_USER, DISK, True),
        (ALL, FIRST_USER, f"{DISK}2 1 0:2 / /sys/fs/cgroup/memory ro,nosuid - cgroup cgroup rw\n", True),
        (ALL, FIRST_USER, f"{DISK}2 1 0:2 / /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw\n", False),
    ],
)
def test_root_with_all_capabilities_of_the_host_is_exempt(
    proc: FakeProc, capabilities: str, user: str, mounts: str, counted: bool
) -> None:
    proc.add("10", "weight-brokerd", namespace=OTHER, capabilities=capabilities, user=user, mounts=mounts)
    assert occupation.is_counted_as_container("10", proc.path) is counted


@pytest.mark.parametrize(
    ("pids", "mounts", "counted"), [(OTHER_PID, DISK, True), (FIRST_PID, OVERLAY, True), (FIRST_PID, DISK, None)]
)
def test_where_the_hosts_namespace_cannot_be_seen_the_signs_of_a_container_count(
    proc: FakeProc, pids: str, mounts: str, counted: bool | None
) -> None:
    proc.hide_the_host()
    proc.add("self", "doctor", pids=pids, mounts=mounts)
    assert occupation.is_counted_as_container("self", proc.path) is counted


def test_what_cannot_be_seen_is_said_with_what_to_do(proc: FakeProc) -> None:
    proc.hide_the_host()
    found = look(proc, 0)["mount namespace"]
    assert found.verdict is Verdict.WARNING
    assert "root" in found.fix


def test_nothing_is_said_of_a_process_that_only_has_the_number_of_the_broker(proc: FakeProc) -> None:
    proc.add("10", "vllm", namespace=OTHER)
    for pid in (10, 11):
        found = look(proc, pid)["mount namespace"]
        assert found.verdict is Verdict.OK
        assert "cannot be seen from here" in found.found


def test_who_has_a_card_open_is_listed_with_the_namespace(proc: FakeProc) -> None:
    proc.add("10", "weight-brokerd", descriptors=["/dev/davinci0", "/dev/davinci0", "/dev/davinci_manager"])
    proc.add("20", "vllm", namespace=OTHER, descriptors=["/dev/davinci0", "/dev/davinci3"])
    found = look(proc)
    assert found["davinci0"].found == (
        f"opened by weight-brokerd (pid 10, mount namespace of the host), vllm (pid 20, {OTHER})"
    )
    assert found["davinci3"].found == f"opened by vllm (pid 20, {OTHER})"


def test_containers_that_have_cards_are_listed_by_the_driver(proc: FakeProc) -> None:
    proc.add("10", "weight-brokerd")
    (proc.path / "uda").mkdir()
    (proc.path / "uda/namespace_node").write_text(
        "ns_id 0 identify 1 root_tgid 1 dev_num 2 namespace 00(#), udev list:\n"
        "logic_devid udevid\n       0        0\n       1        1\n\n\n"
        "ns_id 1 identify 2 root_tgid 4711 dev_num 1 namespace 01, udev list:\n"
        "logic_devid udevid\n       0        6\n       1        7\n\n\n"
    )
    found = look(proc)
    assert found["container of pid 4711"].found == "the driver has given it davinci6, davinci7"
    assert "container of pid 1" not in found


@pytest.mark.parametrize(("namespace", "verdict"), [(HOST, Verdict.OK), (OTHER, Verdict.WARNING)])
def test_the_state_of_device_share_matters_only_to_what_counts_as_a_container(
    proc: FakeProc, tmp_path: Path, namespace: str, verdict: Verdict
) -> None:
    proc.add("10", "weight-brokerd", namespace=namespace)
    chip = "\tNPU ID                         : {}\n\tDevice-share Status            : {}\n\tChip ID : 0\n"
    smi = npu_smi(tmp_path, chip.format(0, "True") + chip.format(1, "False"))
    found = look(proc, smi=smi)["device-share"]
    assert (found.verdict, found.found) == (verdict, "NPU 0 on, NPU 1 off")
    assert ("npu-smi set -t device-share -i 1 -d 1" in found.fix) is (verdict is Verdict.WARNING)


def test_an_answer_without_the_state_is_no_finding(proc: FakeProc, tmp_path: Path) -> None:
    smi = npu_smi(tmp_path, "This device does not support querying device-share.")
    assert "device-share" not in look(proc, smi=smi)
