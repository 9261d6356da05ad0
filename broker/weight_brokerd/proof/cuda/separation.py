"""Memory of a process of another user, or in other namespaces: what containers and services meet."""

from __future__ import annotations

from weight_brokerd.proof.cuda.scene import (
    ANOTHER_USER,
    NEW_IPC_NAMESPACE,
    NEW_NAMESPACES,
    NEW_PID_NAMESPACE,
    CudaScene,
)
from weight_brokerd.proof.row import REFUSED, UNKNOWN, Table

_table: Table[CudaScene] = Table("470")
ROWS, row = _table.rows, _table.row
_PID_SOURCE = "openucx/ucx PR #11513; vLLM PR #55906 (invalid device context)"
_INVALID_CONTEXT = 201


@row(
    "G4",
    "cuIpcOpenMemHandle_v2",
    done=f"root exports, uid {ANOTHER_USER} opens",
    expected=REFUSED,
    source=f"{UNKNOWN}. open-gpu-kernel-modules rmapi/sharing.c: the policy is ALL or OS_SECURITY_TOKEN (same user); "
    "which of them libcuda sets is in no document",
    needed_by="the user that the broker runs as on GPU hosts",
)
def another_user(scene: CudaScene) -> object:
    _, handle = scene.shared()
    return scene.process(user=ANOTHER_USER).open(handle).code


@row(
    "G4.root",
    "cuIpcOpenMemHandle_v2",
    done=f"uid {ANOTHER_USER} exports, root opens",
    expected=REFUSED,
    source=f"{UNKNOWN}. As G4; osValidateClientTokens has no exemption for root that is public",
    needed_by="whether a broker that runs as root serves instances of any user",
)
def root(scene: CudaScene) -> object:
    exporter = scene.process(user=ANOTHER_USER)
    handle = exporter.handle(exporter.malloc(2 << 20))
    return scene.process().open(handle).code


@row(
    "G5.pid",
    "cuIpcOpenMemHandle_v2",
    done="a process in a new pid namespace opens",
    expected=_INVALID_CONTEXT,
    source=_PID_SOURCE,
    needed_by="the refusal that names pid namespaces; docs, GPU hosts",
)
def pid_namespace(scene: CudaScene) -> object:
    _, handle = scene.shared()
    return scene.process(prefix=NEW_PID_NAMESPACE).open(handle).code


@row(
    "G5.exporter",
    "cuIpcOpenMemHandle_v2",
    done="a process in a new pid namespace exports, one outside opens",
    expected=_INVALID_CONTEXT,
    source=_PID_SOURCE,
    needed_by="a broker with the host's pid namespace and an instance in a container",
)
def exporters_namespace(scene: CudaScene) -> object:
    exporter = scene.process(prefix=NEW_PID_NAMESPACE)
    handle = exporter.handle(exporter.malloc(2 << 20))
    return scene.process().open(handle).code


@row(
    "G5.ipc",
    "cuIpcOpenMemHandle_v2",
    done="a process in a new ipc namespace opens",
    expected=REFUSED,
    source=f"{UNKNOWN}. ucx #10070 asks for --ipc=host",
    needed_by="docs, GPU hosts: --ipc=host",
)
def ipc_namespace(scene: CudaScene) -> object:
    _, handle = scene.shared()
    return scene.process(prefix=NEW_IPC_NAMESPACE).open(handle).code


@row(
    "G5.both",
    "cuIpcOpenMemHandle_v2",
    done="a process in a new pid namespace and a new ipc namespace opens",
    expected=_INVALID_CONTEXT,
    source=_PID_SOURCE,
    needed_by="an ordinary container",
)
def both_namespaces(scene: CudaScene) -> object:
    _, handle = scene.shared()
    return scene.process(prefix=NEW_NAMESPACES).open(handle).code
