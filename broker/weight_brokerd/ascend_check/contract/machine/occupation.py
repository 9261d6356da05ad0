"""Who may open a card: the mount namespace of its first opener, until the last process of that namespace is gone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from weight_brokerd.ascend_check.contract.driver import NULL, DriverProcess, NotRun, Scene, i32
from weight_brokerd.ascend_check.contract.machine import facts
from weight_brokerd.ascend_check.contract.row import REFUSED, rows

ROWS, row = rows()
_SOURCE = "drv pbl/uda/uda_access.c uda_cur_is_admin (181), uda_occupy_dev_by_ns (1022-1047)"
_UNIT = "the unit makes no mount namespace (deploy/systemd/npu.conf), or an engine's container cannot have its card"
OTHER_UID = 65534
"""Neither root nor a user with a name: what counts is that it is not root."""


def _contained() -> tuple[str, ...]:
    """A process as the driver sees one of a container: its own mount namespace, and no root."""
    if os.geteuid():
        raise NotRun("only root can start processes in namespaces of their own: run it as root, outside a container")
    groups = {str(node.stat().st_gid) for node in Path("/dev").glob("davinci*")}
    return "--own", "mnt", "--uid", str(OTHER_UID), *(["--groups", *sorted(groups)] if groups else ())


def _started(scene: Scene, options: Sequence[str] = ()) -> tuple[DriverProcess, int]:
    """A process that has tried to open card 0, and the code."""
    process = scene.fresh(options=options)
    process.code("aclInit", NULL)
    return process, process.code("aclrtSetDevice", i32(0))


def _require_host() -> None:
    if facts.in_hosts_mount_namespace() is False:
        raise NotRun("this process is in a mount namespace of its own: the driver counts it as a container's")


def _require_no_sharing() -> None:
    shared = str(facts.host()["tools"])
    if "Device-share Status" in shared and "True" in shared:
        raise NotRun("device-share is on: `npu-smi set -t device-share -i 0 -c 0 -d 0`, and run it again")


@row(
    "O1",
    "aclrtSetDevice",
    done="two mount namespaces (containers): the card is set in one, in the other, and there after the first one's end",
    expected=(0, REFUSED, 0),
    owner="a card belongs to the mount namespace of its opener; the host's, and root with all capabilities, are exempt",
    source="drv uda_access.c uda_occupy_dev_by_ns, uda_cur_is_admin",
    needed_by=_UNIT,
)
def occupied(scene: Scene) -> object:
    _require_no_sharing()
    first, second = scene.in_a_container(), scene.in_a_container()
    codes = first.code("aclrtSetDevice", i32(0)), second.code("aclrtSetDevice", i32(0))
    first.kill()
    return *codes, second.code("aclrtSetDevice", i32(0))


@row(
    "O2",
    "aclrtSetDevice",
    done="a process of another uid and mount namespace has card 0; a process of the host opens it too",
    expected=(0, 0),
    source=_SOURCE,
    needed_by="a broker in the host's mount namespace serves containers without device-share",
)
def host_opens(scene: Scene) -> object:
    _require_host()
    _, first = _started(scene, _contained())
    return first, _started(scene)[1]


@row(
    "O3",
    "aclrtSetDevice",
    done="a process of the host has card 0; a process of another uid and mount namespace opens it",
    expected=(0, 0),
    source=_SOURCE + ": a process of the host occupies nothing",
    needed_by="the broker may be there before the engine's container",
)
def container_after_host(scene: Scene) -> object:
    _require_host()
    options = _contained()
    _, first = _started(scene)
    return first, _started(scene, options)[1]
