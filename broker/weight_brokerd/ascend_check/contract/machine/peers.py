"""Memory of one card in a process of another one, and memory that ends while it is in use."""

from __future__ import annotations

from weight_brokerd.ascend_check.contract.driver import (
    CHUNK,
    MIB,
    OUT_I32,
    OUT_POINTER,
    OUT_SIZE,
    WITHIN_DEVICE,
    DriverProcess,
    Scene,
    i32,
    pointer,
    size,
    u32,
)
from weight_brokerd.ascend_check.contract.row import REFUSED, UNKNOWN, Assumed, rows

ROWS, row = rows()
_BYTES = "abcd"
_HBM = 1
_LOOPS = 200
_PLANE = "the data plane peer_copy: a copy between cards without HCCL"


def _exported(scene: Scene) -> tuple[DriverProcess, DriverProcess, str]:
    """A process on card 0, one on card 1, and a key of the first one's memory."""
    exporter, importer = scene.process(0), scene.process(1)
    address = exporter.malloc(CHUNK)
    exporter.write(address, _BYTES)
    return exporter, importer, exporter.export(address, CHUNK)[1]


def _copied(process: DriverProcess, code: int, source: int) -> tuple[int, str]:
    """The code of copying imported memory to this card, and what arrives."""
    if code:
        return code, ""
    own = process.malloc(CHUNK)
    copied = process.copy_in_stream(own, source, CHUNK)
    return copied, process.read(own, 2)[1] if not copied else ""


def _with_peer_access(process: DriverProcess) -> int:
    return process.code("aclrtDeviceEnablePeerAccess", i32(0), u32(0))


@row(
    "P6.access",
    "aclrtDeviceCanAccessPeer",
    done="from card 1: can card 0 be accessed",
    expected=UNKNOWN,
    source="acl_rt.h; where the cards have no link it is 0",
    needed_by=_PLANE,
)
def access(scene: Scene) -> object:
    return scene.process(1).value("aclrtDeviceCanAccessPeer", OUT_I32, i32(1), i32(0))


@row(
    "P6.key",
    "aclrtIpcMemImportByKey",
    "aclrtDeviceEnablePeerAccess",
    done="on card 1, a key of card 0: import with flag 0; peer access; import with flag 1; copy it here; its bytes",
    expected=(UNKNOWN, 0, UNKNOWN, UNKNOWN, UNKNOWN),
    context="a thread with a device",
    source="unknown: the kernel's module forbids neither",
    needed_by=_PLANE,
)
def key_between_cards(scene: Scene) -> object:
    _, plain, key = _exported(scene)
    refused = plain.import_key(key)[0]
    importer = scene.process(1)
    allowed = _with_peer_access(importer)
    code, address = importer.import_key(key, flags=1)
    return refused, allowed, code, *_copied(importer, code, address)


@row(
    "P6.chunk",
    "aclrtMemImportFromShareableHandle",
    "aclrtDeviceEnablePeerAccess",
    done="on card 1, a chunk of card 0: peer access; import for card 1; for card 0; map and copy it here; its bytes",
    expected=(0, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN),
    context="a thread with a device",
    source="unknown",
    needed_by=_PLANE,
)
def chunk_between_cards(scene: Scene) -> object:
    exporter, importer = scene.process(0), scene.process(1)
    address, handle = exporter.mapped_chunk()
    exporter.write(address, _BYTES)
    shareable = int(exporter.share(handle).value)
    allowed = _with_peer_access(importer)
    here, there = (importer.adopt(shareable, device) for device in (1, 0))
    answer = there if here.code else here
    if answer.code:
        return allowed, here.code, there.code, answer.code, ""
    mapped = importer.reserve()
    code = importer.map(mapped, int(answer.value))
    return allowed, here.code, there.code, *_copied(importer, code, mapped)


@row(
    "P8.copying",
    "aclrtMemcpy",
    done="copies from imported memory without a pause; the exporter is killed: do they fail; own memory is read then",
    expected=(True, Assumed(REFUSED)),
    context="a thread with a device",
    source="drv 9.0.0 svm_shmem_node.c devmm_ipc_proc_node_create_recycle; the last value: unknown",
    needed_by="a dead instance in mid-transfer costs the sender of its card, which is replaced",
)
def dies_while_copied(scene: Scene) -> object:
    exporter, importer = scene.process(), scene.process()
    address = exporter.malloc(16 * MIB)
    _, source = importer.import_key(exporter.export(address, 16 * MIB)[1])
    own = importer.malloc(16 * MIB)
    part = size(16 * MIB)
    copy = pointer(own), part, pointer(source), part, i32(WITHIN_DEVICE)
    waiting = [importer.begin("aclrtMemcpy", *copy) for _ in range(_LOOPS)]
    first = waiting[0]()
    exporter.kill()
    codes = [first.code, *(answer().code for answer in waiting[1:]), importer.code("aclrtMemcpy", *copy)]
    return any(codes), importer.read(own)[0]


@row(
    "P11.released",
    "aclrtGetMemInfo",
    "aclrtFreePhysical",
    done="100 chunks are imported, the exporter is killed: free memory when they are released, compared with before",
    expected=True,
    context="a thread with a device",
    owner="the last handle or mapping gives the memory back",
    source="drv 9.0.0 svm_master_mem_share.c: counted",
    needed_by="memory of a dead instance is on the card until the broker has unmapped it",
)
def released(scene: Scene) -> object:
    importer, exporter = scene.process(), scene.process()
    shared = [exporter.share(exporter.chunk().value).value for _ in range(100)]
    handles = [importer.value("aclrtMemImportFromShareableHandle", ("u64", one), i32(0), OUT_POINTER) for one in shared]
    exporter.kill()
    held = free_bytes(importer)
    for handle in handles:
        importer.code("aclrtFreePhysical", pointer(handle))
    return free_bytes(importer) - held >= len(handles) * CHUNK


def free_bytes(process: DriverProcess) -> int:
    """Of the card's HBM."""
    return int(process.value("aclrtGetMemInfo", i32(_HBM), OUT_SIZE, OUT_SIZE))
