"""HCCL when a rank dies, and in networks other than the host's."""

from __future__ import annotations

import os
import time

from weight_brokerd.ascend_check.contract.driver import CHUNK, PORTS_CHOSEN, ROOT_INFO_BYTES, NotRun, Scene
from weight_brokerd.ascend_check.contract.links import connected
from weight_brokerd.ascend_check.contract.row import REFUSED, UNKNOWN, rows

ROWS, row = rows()
_EXEC_SECONDS = 5


@row(
    "H5",
    "HcclSend",
    "aclrtSynchronizeStreamWithTimeout",
    done=f"HCCL_EXEC_TIMEOUT={_EXEC_SECONDS}: the receiver is killed: the sender's error, after seconds",
    expected=(REFUSED, UNKNOWN),
    context="a thread with a device",
    source="hccl docs HCCL_EXEC_TIMEOUT.md; after how long: unknown",
    needed_by="cards.transfer_seconds, after which the broker kills the sender",
)
def receiver_dies(scene: Scene) -> object:
    variables = PORTS_CHOSEN | {"HCCL_EXEC_TIMEOUT": str(_EXEC_SECONDS)}
    one, other = connected(scene.process(0, **variables), scene.process(1, **variables))
    sent = one.move("HcclSend", one.process.malloc(CHUNK), 1)
    other.process.kill()
    began = time.monotonic()
    return sent or one.wait(), round(time.monotonic() - began, 1)


@row(
    "H6.loopback",
    "HcclGetRootInfo",
    done="HCCL_IF_IP=127.0.0.1: code of the root information",
    expected=UNKNOWN,
    context="a thread with a device",
    source="unknown",
    needed_by="a host without another network, and a broker that may use none",
)
def loopback(scene: Scene) -> object:
    process = scene.process(0, **PORTS_CHOSEN, HCCL_IF_IP="127.0.0.1")
    return process.code("HcclGetRootInfo", ("room", ROOT_INFO_BYTES))


@row(
    "H6.alone",
    "HcclGetRootInfo",
    done="in a network namespace without any network: code of the root information",
    expected=UNKNOWN,
    context="a thread with a device",
    source="unknown",
    needed_by="containers of the broker need --net=host or a network",
)
def without_network(scene: Scene) -> object:
    if os.geteuid():
        raise NotRun("only root can start a process in a network namespace of its own")
    process = scene.process(0, None, ("--own", "net"), **PORTS_CHOSEN)
    return process.code("HcclGetRootInfo", ("room", ROOT_INFO_BYTES))
