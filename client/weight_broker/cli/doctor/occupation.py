"""The doctor's checks of who may open a card. Ascend's driver gives a card to the mount namespace of its first opener.
Processes in the host's own are exempt, and so is root with all capabilities."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from weight_broker.cli.doctor.findings import Finding, ok, warning

PROC = Path("/proc")
_FIRST_PID_NAMESPACE, _FIRST_USER_NAMESPACE = "pid:[4026531836]", "user:[4026531837]"
"""The kernel gives these numbers to the namespaces of the host."""
_CHECK = "mount namespace"
_SMI_SECONDS = 20.0
_CARD = re.compile(r"/davinci(\d+)$")
_SHARE = re.compile(r"NPU ID\s*:\s*(\d+)|Device-share Status\s*:\s*(True|False)")
_CONTAINER = re.compile(r"root_tgid (\d+) .*\n.*logic_devid udevid\n((?:\s*\d+ +\d+\n)*)")
_HOST_TGID = "1"


def findings(broker_pid: int, proc: Path = PROC, smi: str = "npu-smi") -> list[Finding]:
    """`broker_pid` is 0 where no broker runs: then this process stands for a broker that is started from here."""
    if broker_pid and not _is_broker(proc / str(broker_pid)):
        apart = ok(_CHECK, "the broker's process cannot be seen from here: `weight-broker doctor` beside it says more")
        return [apart, *_openers(proc)]
    process = str(broker_pid or "self")
    name = f"the broker (pid {broker_pid})" if broker_pid else "a broker started from here"
    counted = is_counted_as_container(process, proc)
    return [_namespace(name, counted), *_openers(proc), *_containers(proc), *_device_share(smi, counted is True)]


def is_counted_as_container(process: str, proc: Path = PROC) -> bool | None:
    """Whether the driver takes the process for one of a container; None where that cannot be seen."""
    own = _link(proc / process / "ns/mnt")
    if own and own == _hosts_namespace(proc):
        return False
    if _is_exempt(process, proc):
        return False
    if own and _hosts_namespace(proc):
        return True
    is_apart = _link(proc / "self/ns/pid") not in ("", _FIRST_PID_NAMESPACE)
    return True if is_apart or _has_image_as_root(process, proc) else None


def _is_broker(process: Path) -> bool:
    """Whether the broker's pid means the same process here: in another pid namespace it does not."""
    return re.search(r"weight[-_]brokerd", _text(process / "cmdline")) is not None


def _namespace(name: str, counted: bool | None) -> Finding:
    if counted is None:
        return warning(_CHECK, f"it cannot be seen which one {name} is in", "run this as root on the host")
    if not counted:
        return ok(_CHECK, f"{name} is in the host's or exempt: the driver leaves the cards to the engines' containers")
    return warning(
        _CHECK,
        f"the driver counts {name} as a container: a card belongs to one container, and the others get EBUSY",
        "with systemd, install deploy/systemd/npu.conf; in a container, run the broker privileged and as root; or "
        "switch device-share on before a container opens the card (docs/ASCEND.md)",
    )


def _openers(proc: Path) -> Iterator[Finding]:
    host = _hosts_namespace(proc)
    openers: defaultdict[int, list[str]] = defaultdict(list)
    for process in sorted((entry for entry in proc.glob("[0-9]*")), key=lambda path: int(path.name)):
        for card in _cards_of(process):
            openers[card].append(_opener(process, host))
    for card, processes in sorted(openers.items()):
        yield ok(f"davinci{card}", f"opened by {', '.join(processes)}")


def _cards_of(process: Path) -> list[int]:
    try:
        targets = [_link(descriptor) for descriptor in (process / "fd").iterdir()]
    except OSError:
        return []  # another user's, or it has ended
    return sorted({int(found[1]) for target in targets if (found := _CARD.search(target))})


def _opener(process: Path, host: str) -> str:
    namespace = _link(process / "ns/mnt")
    where = "mount namespace of the host" if namespace == host else namespace
    return f"{_text(process / 'comm').strip()} (pid {process.name}, {where or 'mount namespace not seen'})"


def _containers(proc: Path) -> Iterator[Finding]:
    """By the driver's own list, which only root can read."""
    for pid, rows in _CONTAINER.findall(_text(proc / "uda/namespace_node")):
        cards = [row.split()[1] for row in rows.splitlines()]
        if pid != _HOST_TGID and cards:
            yield ok(f"container of pid {pid}", f"the driver has given it davinci{', davinci'.join(cards)}")


def _device_share(smi: str, is_needed: bool) -> Iterator[Finding]:
    state = _shared_by_card(smi)
    off = [card for card, is_on in state.items() if not is_on]
    found = ", ".join(f"NPU {card} {'on' if is_on else 'off'}" for card, is_on in state.items())
    if state and off and is_needed:
        command = f"`npu-smi set -t device-share -i {off[0]} -d 1`"
        yield warning("device-share", found, f"as root on the host, before a container opens the card: {command}")
    elif state:
        yield ok("device-share", found)


def _shared_by_card(smi: str) -> dict[str, bool]:
    if shutil.which(smi) is None:
        return {}
    try:
        done = subprocess.run(
            [smi, "info", "-t", "device-share"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SMI_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    card, state = "", dict[str, bool]()
    for number, status in _SHARE.findall(done.stdout):
        card = number or card
        if status:  # of one chip; a card is shared if all of its chips are
            state[card] = state.get(card, True) and status == "True"
    return state


def _hosts_namespace(proc: Path) -> str:
    """Of the kernel's own threads; empty where they cannot be seen."""
    return _link(proc / "2/ns/mnt") if _text(proc / "2/comm").strip() == "kthreadd" else ""


def _is_exempt(process: str, proc: Path) -> bool:
    """Root with all capabilities in the host's user namespace."""
    effective = re.search(r"^CapEff:\s*(\w+)$", _text(proc / process / "status"), re.MULTILINE)
    last = _text(proc / "sys/kernel/cap_last_cap").strip()
    if effective is None or not last.isdecimal() or _link(proc / process / "ns/user") != _FIRST_USER_NAMESPACE:
        return False
    return int(effective[1], 16) == (2 << int(last)) - 1 and not _is_cgroup_read_only(process, proc)


def _is_cgroup_read_only(process: str, proc: Path) -> bool:
    """As the driver looks at it: version 1 only."""
    mounts = _text(proc / process / "mountinfo")
    return re.search(r" /sys/fs/cgroup/memory ro[, ]", mounts) is not None


def _has_image_as_root(process: str, proc: Path) -> bool:
    return re.search(r" / / .* - overlay ", _text(proc / process / "mountinfo")) is not None


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
