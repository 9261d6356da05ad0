"""What the datasystem's plugin is linked against. Much is only linked: RDMA, and its own point-to-point transport."""

from __future__ import annotations

from weight_brokerd.ascend_check.contract.driver import NotRun, Scene
from weight_brokerd.ascend_check.contract.row import rows

ROWS, row = rows()

LINKED_ONLY = (
    "RaDeinit",
    "RaDeregisterMr",
    "RaGetIfaddrs",
    "RaGetIfnum",
    "RaGetNotifyBaseAddr",
    "RaGetQpStatus",
    "RaGetSockets",
    "RaInit",
    "RaMrDereg",
    "RaMrReg",
    "RaQpConnectAsync",
    "RaQpCreateWithAttrs",
    "RaQpDestroy",
    "RaRdevDeinit",
    "RaRdevGetHandle",
    "RaRdevInitV2",
    "RaRegisterMr",
    "RaSendWr",
    "RaSendWrlistExt",
    "RaSetQpAttrQos",
    "RaSetQpAttrRetryCnt",
    "RaSetQpAttrTimeout",
    "RaSocketBatchClose",
    "RaSocketBatchConnect",
    "RaSocketDeinit",
    "RaSocketInit",
    "RaSocketListenStart",
    "RaSocketListenStop",
    "RaSocketWhiteListAdd",
    "RaSocketWhiteListDel",
    "RaTypicalSendWr",
    "_Z11HcclNetInit13NICDeploymentiibb",
    "_Z13HcclNetDeInit13NICDeploymentiib",
    "hrtGetDevicePhyIdByIndex",
    "hrtGetDeviceRefresh",
    "rtDeviceGetBareTgid",
    "rtGeneralCtrl",
    "rtGetDeviceInfo",
    "rtGetDevicePhyIdByIndex",
    "rtGetNotifyAddress",
    "rtGetNotifyID",
    "rtGetSocVersion",
    "rtGetVisibleDeviceIdByLogicDeviceId",
    "rtIpcCloseMemory",
    "rtIpcOpenMemory",
    "rtIpcOpenNotify",
    "rtIpcSetMemoryName",
    "rtIpcSetNotifyName",
    "rtMalloc",
    "rtNotifyGetAddrOffset",
    "rtRDMADBSend",
    "rtSetIpcMemPid",
    "rtSetIpcNotifyPid",
)
CALLED = (
    "HcclCommDestroy",
    "HcclCommInitRootInfoConfig",
    "HcclGetCommAsyncError",
    "HcclGetRootInfo",
    "HcclRecv",
    "HcclSend",
    "aclFinalize",
    "aclInit",
    "aclrtCreateEvent",
    "aclrtCreateStream",
    "aclrtDestroyEvent",
    "aclrtDestroyStream",
    "aclrtDestroyStreamForce",
    "aclrtDeviceDisablePeerAccess",
    "aclrtDeviceEnablePeerAccess",
    "aclrtFree",
    "aclrtFreeHost",
    "aclrtGetDevice",
    "aclrtGetDeviceCount",
    "aclrtHostRegister",
    "aclrtLaunchCallback",
    "aclrtMalloc",
    "aclrtMallocHost",
    "aclrtMemcpy",
    "aclrtMemcpyAsync",
    "aclrtMemcpyBatch",
    "aclrtProcessReport",
    "aclrtQueryDeviceStatus",
    "aclrtQueryEventStatus",
    "aclrtRecordEvent",
    "aclrtResetDevice",
    "aclrtSetDevice",
    "aclrtSubscribeReport",
    "aclrtSynchronizeEvent",
    "aclrtSynchronizeEventWithTimeout",
    "aclrtSynchronizeStream",
    "aclrtSynchronizeStreamWithTimeout",
    "aclrtUnSubscribeReport",
    "rtNotifyCreate",
    "rtNotifyDestroy",
    "rtNotifyRecord",
    "rtNotifyWait",
)
"""Undefined symbols of libacl_plugin.so in openyuanrong-datasystem 0.8.1."""


@row(
    "P1",
    *LINKED_ONLY,
    done="is each of them there",
    expected=(),
    source="nm -D of libacl_plugin.so 0.8.1 (BIND_NOW); ra.h: HCCL >= 8.5",
    needed_by="CANN 8.5 is the oldest in which the datasystem's client loads",
)
def linked(scene: Scene) -> object:
    missing = scene.fresh().missing(LINKED_ONLY + CALLED)
    if "aclInit" in missing:
        raise NotRun(
            "aclInit is not in this CANN: is libascendcl.so found? Source set_env.sh, or set cards.library_path"
        )
    return tuple(missing)
