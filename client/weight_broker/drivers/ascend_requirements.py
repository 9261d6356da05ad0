"""The oldest parts of an Ascend host that the broker works with. Each `..._problem` says what is missing and what to
install, or is empty. What instances need is less: see docs/ASCEND.md."""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path

from weight_broker.drivers import hdk
from weight_broker.drivers.cann_symbols import Looked

CANN_FLOOR = "8.5.0"
"""Of the broker's environment."""
DATASYSTEM = "openyuanrong-datasystem"
DATASYSTEM_FLOOR = (0, 8, 0)
GLIBC_FLOOR = (2, 34)
"""Of the datasystem's wheel."""

_FIRST_VIRTUAL = 100
"""Numbers of virtual NPUs begin here."""
_INSTALL_CANN = (
    f"install CANN {CANN_FLOOR} or newer for the broker and name its lib64 in cards.library_path (images of vLLM "
    "Ascend 0.13.0rc2 and newer have it, those of 0.13.0rc1 and older do not)"
)
_WITHOUT_SHARING = "it cannot share memory between processes; only Atlas A2 and A3 can. Weights come from disk"
_REFUSED_CHIPS = (
    (re.compile(r"Ascend310P"), "310P"),
    (re.compile(r"Ascend310"), "310"),
    # The first 910 are called 910A and 910B; those of the A2 series have a digit after the B.
    (re.compile(r"Ascend910(Pro|Premium)?[AB]$"), "910A"),
)


def cann_problem(looked: Looked) -> str:
    """Of CANN's libraries, as a card process finds them."""
    if looked.missing:
        return f"this CANN is older than {CANN_FLOOR}: there is no {', no '.join(looked.missing)}; {_INSTALL_CANN}"
    if looked.unloadable:
        words = ", ".join(looked.unloadable.values())
        return (
            f"{' and '.join(looked.unloadable)} of CANN cannot be loaded ({words}); set cards.library_path to the "
            f"lib64 of CANN {CANN_FLOOR} or newer and of the driver, or source CANN's set_env.sh before the start"
        )
    return ""


def driver_problem(version: str | None) -> str:
    """Of the driver (HDK); `version` is None where it cannot be seen."""
    if version is None or not hdk.is_below(version, hdk.SHARING_FLOOR):
        return ""
    return (
        f"driver (HDK) {version} cannot share memory between processes; install {hdk.SHARING_FLOOR} or newer, "
        f"{hdk.CHUNK_SHARING_FLOOR} for vLLM Ascend 0.16 and newer, which use expandable segments by default"
    )


def chip_problem(soc: str) -> str:
    """Of a card, by the name that the driver gives to its processor."""
    name = next((name for pattern, name in _REFUSED_CHIPS if pattern.match(soc)), None)
    return f"{soc} is a {name}: {_WITHOUT_SHARING}" if name else ""


def is_virtual(number: int) -> bool:
    """Whether a physical number is that of a virtual NPU."""
    return number >= _FIRST_VIRTUAL


def virtual_problem(device: str) -> str:
    """Of a card, by its identity, "npu:3"."""
    number = device.rpartition(":")[2]
    if not (number.isdecimal() and is_virtual(int(number))):
        return ""
    return (
        f"{device} is a virtual NPU: the driver shares no memory of those; give the broker and the engine whole cards"
    )


def datasystem_problem(version: str | None) -> str:
    """Of the wheel in the broker's environment; `version` is None if there is none."""
    if version is None or _numbers(version) >= DATASYSTEM_FLOOR:
        return ""
    floor = _dotted(DATASYSTEM_FLOOR)
    return (
        f"{DATASYSTEM} {version} is older than {floor}, the oldest that the broker works with; "
        f"run pip install '{DATASYSTEM}>={floor}' in {sys.prefix}, and use the same version for a worker that the "
        "broker does not manage"
    )


def worker_problem(address: str, pid: int, version: str) -> str:
    """Of a running datasystem worker; `version` is empty where it cannot be seen."""
    if not version or _numbers(version) >= DATASYSTEM_FLOOR:
        return ""
    floor = _dotted(DATASYSTEM_FLOOR)
    return (
        f"the datasystem worker at {address} (pid {pid}) is of {DATASYSTEM} {version}, older than {floor}, the oldest "
        f"that the broker works with; run pip install '{DATASYSTEM}>={floor}' where it is installed, and restart it"
    )


def wheel_hindrance(
    libc: tuple[str, str] | None = None, python: tuple[int, int] | None = None, machine: str | None = None
) -> str:
    """Why there is no wheel of the datasystem for this host; the arguments are this host's unless set."""
    libc = libc or platform.libc_ver()
    python = python or sys.version_info[:2]
    machine = machine or platform.machine()
    if libc[0] == "glibc" and _numbers(libc[1]) < GLIBC_FLOOR:
        floor = _dotted(GLIBC_FLOOR)
        return (
            f"the wheel of {DATASYSTEM} needs glibc {floor}, and this host has {libc[1]}: run the broker on openEuler "
            "22.03, Ubuntu 22.04 or newer, or in a container of those"
        )
    newest = (3, 12) if machine == "x86_64" else (3, 11)
    if not (3, 9) <= python <= newest:
        return (
            f"there is no wheel of {DATASYSTEM} for Python {python[0]}.{python[1]} on {machine}: make the broker's "
            f"environment with Python 3.9 to {newest[0]}.{newest[1]}"
        )
    return ""


def installed_datasystem(root: Path) -> str | None:
    """The version of the wheel whose files are in `root`; None if it does not say."""
    try:
        return (root / "VERSION").read_text().strip() or None
    except OSError:
        return None


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
