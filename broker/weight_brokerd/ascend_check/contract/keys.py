"""Sharing plain allocations by export keys."""

from __future__ import annotations

from weight_brokerd.ascend_check.contract.driver import (
    CHUNK,
    FROM_DEVICE,
    MIB,
    NULL,
    OUT_POINTER,
    WITHIN_DEVICE,
    DriverProcess,
    Scene,
    content,
    i32,
    pointer,
    size,
    u64,
)
from weight_brokerd.ascend_check.contract.row import REFUSED, Assumed, rows

ROWS, row = rows()
_CREATE = "drv 9.0.0 svm_shmem_interprocess.c devmm_ipc_mem_create_para_check"
_CLOSE = "rt 9.0.0 api_impl.cc IpcCloseMemoryByName"
_BYTES = "abcd"


def _shared(scene: Scene, count: int = CHUNK) -> tuple[DriverProcess, DriverProcess, int, str]:
    """Exporter, importer, the exporter's address and the key."""
    exporter, importer = scene.process(), scene.process()
    address = exporter.malloc(count)
    exporter.write(address, _BYTES)
    return exporter, importer, address, exporter.export(address, count)[1]


@row(
    "M1",
    "aclrtMalloc",
    "aclrtFree",
    done="20 MiB; free; free again",
    expected=(0, 0, REFUSED),
    context="malloc: a thread with a device; free: any thread",
    owner="freed at once, whatever a task or an importer does with it",
    source="rt 9.0.0 api_impl.cc DevMalloc, DevFree",
    needed_by="staging buffers, Staging",
)
def allocation(scene: Scene) -> object:
    process = scene.process()
    answer = process.call("aclrtMalloc", OUT_POINTER, size(20 * MIB), i32(0))
    frees = [process.code("aclrtFree", pointer(answer.value)) for _ in range(2)]
    return answer.code, *frees


@row(
    "M2",
    "aclrtMemcpy",
    done="to the card, within it, back: codes and bytes; with too little room",
    expected=(0, 0, 0, _BYTES, REFUSED),
    context="a thread with a device; returns when it is done",
    source="acl_rt.h",
    needed_by="copies within a card, digests",
)
def copies(scene: Scene) -> object:
    process = scene.process()
    one, other = process.malloc(CHUNK), process.malloc(CHUNK)
    wrote = process.write(one, _BYTES)
    within = process.code("aclrtMemcpy", pointer(other), size(64), pointer(one), size(64), i32(WITHIN_DEVICE))
    code, read = process.read(other, 2)
    room = process.code("aclrtMemcpy", ("room", 8), size(8), pointer(other), size(64), i32(FROM_DEVICE))
    return wrote, within, code, read, room


@row(
    "P4.parts",
    "aclrtIpcMemGetExportKey",
    done="keys of one allocation of 20 MiB: whole, again, 2 MiB at 2 MiB, 4096 bytes at 512",
    expected=(0, 0, 0, REFUSED),
    context="a thread with a device",
    owner="each key is closed by its exporter",
    source=_CREATE,
    needed_by="ExportedSegments exports whole allocations; that is its choice",
)
def parts(scene: Scene) -> object:
    process = scene.process()
    base = process.malloc(20 * MIB)
    spans = ((0, 20 * MIB), (0, 20 * MIB), (CHUNK, CHUNK), (512, 4096))
    return tuple(process.export(base + at, count)[0] for at, count in spans)


@row(
    "P4.pids",
    "aclrtIpcMemSetImportPid",
    done="with a whitelist: before and after the importer was admitted; without one: admit",
    expected=(REFUSED, 0, 0, REFUSED),
    context="a thread with a device",
    source="drv 9.0.0 svm_shmem_node.c:1076: EPERM",
    needed_by="keys are exported to any process and go to the broker alone",
)
def admitting(scene: Scene) -> object:
    exporter, importer, address, free_key = _shared(scene)
    _, key = exporter.export(address, CHUNK, flags=0)
    pids = ("pids", [importer.tgid()]), size(1)
    before = importer.import_key(key)[0]
    admitted = exporter.code("aclrtIpcMemSetImportPid", content(key), *pids)
    after = importer.import_key(key)[0]
    return before, admitted, after, exporter.code("aclrtIpcMemSetImportPid", content(free_key), *pids)


@row(
    "P5.import",
    "aclrtIpcMemImportByKey",
    done="import with flag 0; its bytes; with flag 1: the same address",
    expected=(0, _BYTES, 0, True),
    context="a thread on the memory's card",
    owner="counted by the runtime; each import is closed",
    source="drv 9.0.0 devmm_svm.c devmm_record_get",
    needed_by="NpuDriver.map imports once, with flag 0",
)
def importing(scene: Scene) -> object:
    _, importer, _, key = _shared(scene)
    code, address = importer.import_key(key)
    _, read = importer.read(address, 2)
    again, same = importer.import_key(key, flags=1)
    return code, read, again, address == same


@row(
    "P5.close",
    "aclrtIpcMemClose",
    done="an import: in a thread without a device, close, close again",
    expected=(107002, 0, REFUSED),
    context="a thread with a device",
    owner="one close for one import",
    source=_CLOSE,
    needed_by="NpuDriver.map closes once, on its card",
)
def closing(scene: Scene) -> object:
    _, importer, _, key = _shared(scene)
    importer.import_key(key)
    return importer.close_key(key, thread=True), importer.close_key(key), importer.close_key(key)


@row(
    "P5.counted",
    "aclrtIpcMemClose",
    done="two imports: close; are the bytes there still; close again",
    expected=(0, _BYTES, REFUSED),
    context="a thread with a device",
    owner="the first close forgets the key: the second import stays until the process ends",
    source=_CLOSE + "; drv 9.0.0 devmm_svm.c halShmemCloseHandle",
    needed_by="CardMemory and Buckets import once in a process",
)
def counted(scene: Scene) -> object:
    _, importer, _, key = _shared(scene)
    _, address = importer.import_key(key)
    importer.import_key(key)
    return importer.close_key(key), importer.read(address, 2)[1], importer.close_key(key)


@row(
    "P6",
    "aclrtIpcMemImportByKey",
    done="an own key in the exporting process",
    expected=Assumed(REFUSED),
    context="a thread with a device",
    source="unknown: the worse is assumed",
    needed_by="importers are the broker's processes",
)
def own_key(scene: Scene) -> object:
    exporter, _, _, key = _shared(scene)
    return exporter.import_key(key)[0]


@row(
    "P7.close",
    "aclrtIpcMemClose",
    done="the exporter closes while it is imported; the importer reads; reads its own memory then",
    expected=(0, REFUSED, Assumed(REFUSED)),
    owner="the driver takes the memory from every importer at once",
    context="a thread with a device",
    source="drv 9.0.0 svm_shmem_node.c _devmm_ipc_node_free_open_pages; the last value: unknown, the worse is assumed",
    needed_by="memory is released on the broker's word, never because a close succeeded",
)
def exporter_closes(scene: Scene) -> object:
    exporter, importer, _, key = _shared(scene)
    _, address = importer.import_key(key)
    own = importer.malloc(CHUNK)
    return exporter.close_key(key), importer.read(address)[0], importer.read(own)[0]


@row(
    "P8.read",
    "aclrtIpcMemImportByKey",
    done="the exporter is killed: the importer reads; another process imports",
    expected=(REFUSED, REFUSED),
    owner="as when the exporter closes",
    context="a thread with a device",
    source="drv 9.0.0 svm_shmem_node.c devmm_ipc_proc_node_create_recycle",
    needed_by="a dead instance costs its own publications only",
)
def exporter_dies(scene: Scene) -> object:
    exporter, importer, _, key = _shared(scene)
    _, address = importer.import_key(key)
    exporter.kill()
    return importer.read(address)[0], scene.process().import_key(key)[0]


@row(
    "P8.close",
    "aclrtIpcMemClose",
    done="the exporter is killed: the importer closes what it has not used since",
    expected=0,
    context="a thread with a device",
    source="drv 9.0.0 svm_shmem_node.c devmm_ipc_node_close: the node lives as long as it is open",
    needed_by="a sender that reads nothing of a dead instance goes on",
)
def close_after_death(scene: Scene) -> object:
    exporter, importer, _, key = _shared(scene)
    importer.import_key(key)
    exporter.kill()
    return importer.close_key(key)


@row(
    "M3",
    "aclrtMallocHost",
    "aclrtFreeHost",
    "aclrtHostRegister",
    done="pinned memory; registered; freed",
    expected=(0, 0, 0),
    context="a thread with a device",
    source="acl_rt.h",
    needed_by="the datasystem's client",
)
def pinned(scene: Scene) -> object:
    process = scene.process()
    answer = process.call("aclrtMallocHost", OUT_POINTER, size(CHUNK))
    registered = process.code("aclrtHostRegister", pointer(answer.value), u64(CHUNK), i32(0), OUT_POINTER)
    return answer.code, registered, process.code("aclrtFreeHost", pointer(answer.value))


@row(
    "M4",
    "aclrtMemcpyBatch",
    done="a batch of one copy within the card, and its bytes",
    expected=(0, _BYTES),
    context="a thread with a device",
    source="acl_rt.h",
    needed_by="the datasystem's client",
)
def batch(scene: Scene) -> object:
    process = scene.process()
    one, other = process.malloc(CHUNK), process.malloc(CHUNK)
    process.write(one, _BYTES)
    pairs = (("pointers", [other]), ("sizes", [64]), ("pointers", [one]), ("sizes", [64]), size(1))
    code = process.code("aclrtMemcpyBatch", *pairs, NULL, NULL, size(0), ("out size", 0))
    return code, process.read(other, 2)[1]
