"""Memory of another card: imported with peer access, and copied without a communicator. Two cards."""

from __future__ import annotations

from weight_brokerd.ascend_check.contract.driver import (
    CHUNK,
    WITHIN_DEVICE,
    DriverProcess,
    Scene,
    i32,
    pointer,
    size,
    u32,
)
from weight_brokerd.ascend_check.contract.row import REFUSED, Assumed, rows

ROWS, row = rows()
_BYTES = "abcd"
_DOC = "rt 9.0.0 doc of aclrtIpcMemImportByKey and aclrtDeviceEnablePeerAccess"
_SOURCE = _DOC + "; api_impl.cc IpcOpenMemory, raw_device.cc EnableP2PWithOtherDevice"
_CHUNKS = "rt 9.0.0 doc of aclrtMemImportFromShareableHandle: across devices with aclrtDeviceEnablePeerAccess"
_NEEDED_BY = "cards.peer_copy: NpuDriver.map"


def _shared(scene: Scene) -> tuple[DriverProcess, DriverProcess, str]:
    """An exporter on device 0, a process on device 1, and the key of memory with known bytes."""
    exporter, importer = scene.process(0), scene.process(1)
    address = exporter.malloc(CHUNK)
    exporter.write(address, _BYTES)
    return exporter, importer, exporter.export(address, CHUNK)[1]


def _enable(importer: DriverProcess) -> int:
    return importer.code("aclrtDeviceEnablePeerAccess", i32(0), u32(0))


def _copied(importer: DriverProcess, source: int) -> tuple[int, str]:
    """The code of copying into own memory, and what is there then."""
    own = importer.malloc(CHUNK)
    return importer.copy_in_stream(own, source, len(_BYTES) // 2), importer.read(own, 2)[1]


@row(
    "P6.peer",
    "aclrtDeviceEnablePeerAccess",
    "aclrtIpcMemImportByKey",
    "aclrtMemcpyAsync",
    done="on another card: peer access enabled, import with flag 1, copied into own memory in a stream: its bytes",
    expected=(0, 0, (0, _BYTES)),
    context="a thread with a device",
    owner="peer access lasts until the process ends",
    source=_SOURCE,
    needed_by=_NEEDED_BY + "; `auto` reads this row",
)
def peer(scene: Scene) -> object:
    _, importer, key = _shared(scene)
    enabled = _enable(importer)
    code, address = importer.import_key(key, flags=1)
    return enabled, code, _copied(importer, address)


@row(
    "P6.peer_now",
    "aclrtMemcpy",
    done="on another card: peer access enabled, import with flag 1, copied into own memory without a stream",
    expected=(0, Assumed(REFUSED)),
    context="a thread with a device",
    source="drv 9.0.0 svm_master_memcpy.c:407 copies it as between host and device; a user (910A, CANN 9.0): 507899, "
    "and it works in a stream",
    needed_by="NpuDriver.copy has a stream",
)
def without_a_stream(scene: Scene) -> object:
    _, importer, key = _shared(scene)
    _enable(importer)
    code, address = importer.import_key(key, flags=1)
    own, count = pointer(importer.malloc(CHUNK)), size(CHUNK)
    return code, importer.code("aclrtMemcpy", own, count, pointer(address), count, i32(WITHIN_DEVICE))


@row(
    "P6.peer_default",
    "aclrtIpcMemImportByKey",
    done="on another card: import with flag 0, nothing enabled",
    expected=REFUSED,
    context="a thread with a device",
    source="unknown: the worse is assumed; the document leaves open whether the import or the copy fails",
    needed_by="the broker maps memory on the memory's card, unless cards.peer_copy is on",
)
def default(scene: Scene) -> object:
    _, importer, key = _shared(scene)
    return importer.import_key(key)[0]


@row(
    "P6.peer_flag",
    "aclrtIpcMemImportByKey",
    done="on another card: import with flag 1, nothing enabled before",
    expected=REFUSED,
    context="a thread with a device",
    source="unknown: the worse is assumed; by the document the flag is enough",
    needed_by=_NEEDED_BY + " enables peer access too",
)
def flag(scene: Scene) -> object:
    _, importer, key = _shared(scene)
    return importer.import_key(key, flags=1)[0]


@row(
    "P6.peer_chunk",
    "aclrtDeviceEnablePeerAccess",
    "aclrtMemImportFromShareableHandle",
    done="on another card: refused; peer access enabled, a chunk imported, mapped, copied in a stream: its bytes",
    expected=(REFUSED, 0, 0, (0, _BYTES)),
    context="a thread with a device",
    owner="as a chunk of the process's own card",
    source=_CHUNKS + "; the first value: unknown, the worse is assumed",
    needed_by=_NEEDED_BY,
)
def chunk(scene: Scene) -> object:
    exporter, importer = scene.process(0), scene.process(1)
    address, handle = exporter.mapped_chunk()
    exporter.write(address, _BYTES)
    shareable = exporter.share(handle).value
    refused = importer.adopt(shareable, 1).code
    enabled, adopted = _enable(importer), importer.adopt(shareable, 1)
    here = importer.reserve()
    mapped = importer.map(here, adopted.value)
    return refused, enabled, mapped, _copied(importer, here)


@row(
    "P6.peer_off",
    "aclrtDeviceDisablePeerAccess",
    done="on another card: peer access enabled and disabled; import with flag 1",
    expected=(0, 0, Assumed(REFUSED)),
    context="a thread with a device",
    source="rt 8.5.0 aclrt_impl/memory.cpp:703-737; the last value: unknown, the worse is assumed",
    needed_by="nothing: peer access stays enabled until the process ends",
)
def off(scene: Scene) -> object:
    _, importer, key = _shared(scene)
    codes = _enable(importer), importer.code("aclrtDeviceDisablePeerAccess", i32(0))
    return *codes, importer.import_key(key, flags=1)[0]


@row(
    "P6.peer_death",
    "aclrtIpcMemImportByKey",
    done="on another card, imported: the exporter is killed; the importer reads; its own memory then",
    expected=(REFUSED, REFUSED),
    context="a thread with a device",
    owner="as on the memory's card",
    source="drv 9.0.0 svm_shmem_node.c _devmm_ipc_node_free_open_pages; the last value: unknown, the worse is assumed",
    needed_by="each transfer copies in a process that serves no other one",
)
def death(scene: Scene) -> object:
    exporter, importer, key = _shared(scene)
    _enable(importer)
    _, address = importer.import_key(key, flags=1)
    own = importer.malloc(CHUNK)
    exporter.kill()
    return importer.read(address)[0], importer.read(own)[0]
