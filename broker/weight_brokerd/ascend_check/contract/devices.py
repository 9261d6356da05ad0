"""Starting, and the three ways to count cards."""

from __future__ import annotations

from weight_brokerd.ascend_check.contract.driver import (
    CHUNK,
    NULL,
    OUT_I32,
    OUT_U32,
    DriverProcess,
    Scene,
    i32,
    pointer,
    u32,
)
from weight_brokerd.ascend_check.contract.row import REFUSED, rows

ROWS, row = rows()
_NO_CONTEXT = 107002
_INVALID_PARAMETER = 100000
_UNSUPPORTED = 200006
_COUNTING = "rt 8.5.0 to 9.2.0 api_error.cc ApiErrorDecorator: ChgUserDevIdToDeviceId"


@row(
    "P2.without",
    "aclInit",
    "aclrtSetDevice",
    "aclGetRecentErrMsg",
    done="no aclInit: aclrtSetDevice(0); aclrtFree of a wrong address; are there words for it",
    expected=(0, REFUSED, False),
    context="once in a process, before anything else",
    source="rt 9.0.0 aclrt_impl: nothing checks it; doc of aclInit: it has to be called first",
    needed_by="children, probe and ascend_check call aclInit first: operators need the words",
)
def without_init(scene: Scene) -> object:
    process = scene.fresh()
    code = process.code("aclrtSetDevice", i32(0))
    wrong = process.call("aclrtFree", pointer(1))
    return code, wrong.code, bool(wrong.words)


@row(
    "P2.twice",
    "aclInit",
    "aclFinalize",
    done="aclInit, and again",
    expected=(0, 100002),
    context="once in a process",
    source="rt 9.0.0 acl.cpp: ACL_ERROR_REPEAT_INITIALIZE",
    needed_by="Acl.initialize takes 100002 for success",
)
def init_twice(scene: Scene) -> object:
    process = scene.fresh()
    return process.code("aclInit", NULL), process.code("aclInit", NULL)


def _counted(process: DriverProcess) -> int:
    answer = process.call("aclrtGetDeviceCount", OUT_U32)
    return int(answer.value) if not answer.code else 0


@row(
    "P3.order",
    "aclrtGetDeviceCount",
    done='ASCEND_RT_VISIBLE_DEVICES "0,1", "1,0" and "1,1": devices seen',
    expected=(2, 0, 0),
    context="before aclInit too",
    source="rt 8.5.0 runtime.cc GetVisibleDevices: RT_ALL_ORDER_ERROR, RT_ALL_DUPLICATED_ERROR",
    needed_by="doctor; probe",
)
def order(scene: Scene) -> object:
    return tuple(_counted(scene.fresh(visible=visible)) for visible in ("0,1", "1,0", "1,1"))


@row(
    "P3.logical",
    "aclrtGetLogicDevIdByUserDevId",
    done='visible "1": the logical number of device 0',
    expected=1,
    source=_COUNTING,
    needed_by="Region.logical_device: shareable handles carry that number",
)
def logical(scene: Scene) -> object:
    return scene.process(visible="1").value("aclrtGetLogicDevIdByUserDevId", i32(0), OUT_I32)


@row(
    "P3.physical",
    "aclrtGetPhyDevIdByLogicDevId",
    done='visible "1": is the number by the index of this process the one in an export key',
    expected=True,
    source=_COUNTING + "; drv 9.0.0 svm_shmem_interprocess.c _devmm_ipc_mem_name_create",
    needed_by="Acl.physical_device, the card's name on the wire; the check of each export key",
)
def physical(scene: Scene) -> object:
    process = scene.process(visible="1")
    number = process.value("aclrtGetPhyDevIdByLogicDevId", i32(0), OUT_I32)
    _, key = process.export(process.malloc(CHUNK), CHUNK)
    return int(bytes.fromhex(key)[24:26], 16) == number


@row(
    "D1",
    "aclrtSetDevice",
    "aclrtGetDevice",
    "aclrtResetDevice",
    done="in another thread: aclrtGetDevice; in this one: aclrtSetDevice(99), aclrtGetDevice, aclrtResetDevice",
    expected=(_NO_CONTEXT, REFUSED, 0, 0),
    context="the device is set for each thread",
    owner="aclrtResetDevice gives back what the process has on the card",
    source="acl_rt.h; rt 9.0.0 api_impl.cc CurrentContext",
    needed_by="Acl.on_device, probe",
)
def device(scene: Scene) -> object:
    process = scene.process()
    return (
        process.code("aclrtGetDevice", OUT_I32, thread=True),
        process.code("aclrtSetDevice", i32(99)),
        process.value("aclrtGetDevice", OUT_I32),
        process.code("aclrtResetDevice", i32(0)),
    )


@row(
    "D2",
    "aclrtSynchronizeDevice",
    "aclrtQueryDeviceStatus",
    done="both on device 0, in its process",
    expected=(0, 0),
    context="a thread with a device",
    source="acl_rt.h",
    needed_by="export waits for the device; the datasystem's client",
)
def healthy(scene: Scene) -> object:
    process = scene.process()
    return process.code("aclrtSynchronizeDevice"), process.code("aclrtQueryDeviceStatus", i32(0), OUT_I32)


@row(
    "D4",
    "aclrtDeviceEnablePeerAccess",
    "aclrtDeviceDisablePeerAccess",
    "aclrtDeviceCanAccessPeer",
    done="on device 0: the three of them for device 0 itself; with flags 1",
    expected=(_INVALID_PARAMETER, _INVALID_PARAMETER, _INVALID_PARAMETER, _UNSUPPORTED),
    context="a thread with a device",
    source="rt 8.5.0 aclrt_impl/memory.cpp:667-683, 715-719, 639-642; the same in 9.0.0 to 9.2.0-beta.2",
    needed_by="NpuDriver.map asks for peer access to other cards only",
)
def no_peer_of_its_own(scene: Scene) -> object:
    process = scene.process()
    return (
        process.code("aclrtDeviceEnablePeerAccess", i32(0), u32(0)),
        process.code("aclrtDeviceDisablePeerAccess", i32(0)),
        process.code("aclrtDeviceCanAccessPeer", OUT_I32, i32(0), i32(0)),
        process.code("aclrtDeviceEnablePeerAccess", i32(0), u32(1)),
    )


@row(
    "D3",
    "aclrtDeviceGetBareTgid",
    "aclrtGetSocName",
    done="twice: the same number; is there a name",
    expected=(True, True),
    source="acl_rt.h",
    needed_by="Ready.tgid, status and doctor",
)
def names(scene: Scene) -> object:
    process = scene.process()
    return process.tgid() == process.tgid(), bool(process.code("aclrtGetSocName", pointer=True))
