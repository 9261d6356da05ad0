"""What the machine is: without it no answer of the other rows can be compared with another machine's."""

from __future__ import annotations

import grp
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from weight_brokerd.ascend_check.contract.driver import Scene
from weight_brokerd.ascend_check.contract.row import UNKNOWN, rows

ROWS, row = rows()
_DRIVER = Path("/usr/local/Ascend/driver/version.info")
_GROUPS = ("devdrv-cdev", "hisi_davinci_intf", "davinci")
_VARIABLES = ("ASCEND", "HCCL", "PYTORCH_NPU_ALLOC_CONF", "LD_LIBRARY_PATH")
_TOOLS = (
    ("npu-smi", "info", "-t", "topo"),
    ("npu-smi", "info", "-t", "device-share", "-i", "0", "-c", "0"),
    ("npu-smi", "info"),
)
_TOOL_SECONDS = 10.0


def host() -> dict[str, object]:
    """What belongs to the driver, for proof.json."""
    return {
        "libc": "-".join(platform.libc_ver()),
        "driver": _text(_DRIVER),
        "cann": {str(path): _text(path) for path in _cann_files()},
        "character devices": _character_devices(),
        "nodes": [_node(path) for path in sorted(Path("/dev").glob("davinci*"))],
        "in the host's mount namespace": in_hosts_mount_namespace(),
        "variables": {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)},
        "tools": {" ".join(tool): _output(tool) for tool in _TOOLS},
    }


def in_hosts_mount_namespace() -> bool | None:
    """Whether the driver sees a process of the host here and not one of a container. None: process 1 is another user's,
    or this is another pid namespace and process 1 a container's."""
    first = _namespace("1", "mnt")
    return first == _namespace("self", "mnt") if first else None


@row(
    "P0.machine",
    "aclrtGetSocName",
    done="groups of /proc/devices that the driver has; is this the host's mount namespace; visible cards",
    expected=UNKNOWN,
    source="drv 9.0.0 pbl/uda/uda_access.c:1246: devdrv-cdev; uda_cur_is_admin",
    needed_by="deploy/systemd/npu.conf names these groups; doctor says whether the driver counts it as a container",
)
def machine(scene: Scene) -> object:
    answer = scene.fresh().call("aclrtGetDeviceCount", ("out u32", 0))
    return _character_devices(), in_hosts_mount_namespace(), answer.value


def _character_devices() -> list[str]:
    return [line.strip() for line in (_text(Path("/proc/devices")) or "").splitlines() if line.endswith(_GROUPS)]


def _namespace(process: str, name: str) -> str:
    try:
        return os.readlink(f"/proc/{process}/ns/{name}")
    except OSError:
        return ""


def _cann_files() -> Iterator[Path]:
    home = Path(os.environ.get("ASCEND_HOME_PATH") or "/usr/local/Ascend/ascend-toolkit/latest")
    yield home / "version.cfg"
    yield from sorted(home.glob("*/ascend_toolkit_install.info"))


def _node(path: Path) -> str:
    found = path.stat()
    try:
        group = grp.getgrgid(found.st_gid).gr_name
    except KeyError:
        group = str(found.st_gid)
    return f"{path} {found.st_mode & 0o777:o} {found.st_uid}:{group}"


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def _output(tool: tuple[str, ...]) -> str | None:
    if shutil.which(tool[0]) is None:
        return None
    try:
        done = subprocess.run(tool, capture_output=True, text=True, timeout=_TOOL_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stdout or done.stderr).strip()
