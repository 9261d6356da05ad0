"""Sharing chunks (virtual memory management) by shareable handles."""

from __future__ import annotations

from weight_brokerd.ascend_check.contract.driver import (
    CHUNK,
    OUT_POINTER,
    OUT_SIZE,
    WITHIN_DEVICE,
    DriverProcess,
    Scene,
    i32,
    pointer,
    size,
    u64,
)
from weight_brokerd.ascend_check.contract.row import REFUSED, rows

ROWS, row = rows()
_SHARE = "drv 9.0.0 svm_master_mem_share.c"
_ATTRIBUTES = "rt 9.0.0 aclrt_impl/memory.cpp memAttrHandlers; 8.5.0 memory.cpp:912-935"
_RETAIN = "aclrtMemRetainAllocationHandle"
_BYTES = "abcd"


def _shared(scene: Scene) -> tuple[DriverProcess, DriverProcess, int, int]:
    """Exporter, importer, the exporter's handle and the shareable one."""
    exporter, importer = scene.process(), scene.process()
    address, handle = exporter.mapped_chunk()
    exporter.write(address, _BYTES)
    return exporter, importer, handle, int(exporter.share(handle).value)


def _read(process: DriverProcess, handle: int) -> str:
    """The bytes of a chunk, mapped for it."""
    address = process.reserve()
    process.map(address, handle)
    return process.read(address, 2)[1]


@row(
    "P9.attributes",
    "aclrtMallocPhysical",
    done="memory attribute 0, 1, 2, 4, 5 on a card",
    expected=(100000, 100000, 100000, 0, 0),
    owner="aclrtFreePhysical, once for each handle that was given",
    source=_ATTRIBUTES,
    needed_by="Acl.malloc_physical asks for 4",
)
def attributes(scene: Scene) -> object:
    process = scene.process()
    return tuple(process.chunk(attribute).code for attribute in (0, 1, 2, 4, 5))


@row(
    "P9.retain",
    _RETAIN,
    "aclrtFreePhysical",
    done="at the start of a chunk, in another thread; within it; free what was retained",
    expected=(0, REFUSED, 0),
    owner="one aclrtFreePhysical for each",
    source="hardware-truth C3; torch_npu does the same",
    needed_by="export of expandable segments; the size of chunks is found with it",
)
def retain(scene: Scene) -> object:
    process = scene.process()
    address, _ = process.mapped_chunk()
    answer = process.call(_RETAIN, pointer(address), OUT_POINTER, thread=True)
    inside = process.code(_RETAIN, pointer(address + 4096), OUT_POINTER)
    return answer.code, inside, process.code("aclrtFreePhysical", pointer(answer.value))


@row(
    "P9.map",
    "aclrtReserveMemAddress",
    "aclrtMapMem",
    "aclrtUnmapMem",
    "aclrtReleaseMemAddress",
    done="reserve; map, unmap, map and unmap in another thread; release",
    expected=(0, 0, 0, 0, 0),
    context="map and unmap: any thread",
    owner="a mapping holds the memory like a handle",
    source="rt 9.0.0 api_impl.cc MapMem, UnmapMem",
    needed_by="NpuDriver maps chunks; no aclrtMemSetAccess, as torch_npu",
)
def mapping(scene: Scene) -> object:
    process = scene.process()
    address, handle = process.reserve(), process.chunk().value
    codes = []
    for thread in (False, True):
        codes.append(process.map(address, handle, thread=thread))
        codes.append(process.code("aclrtUnmapMem", pointer(address), thread=thread))
    return *codes, process.code("aclrtReleaseMemAddress", pointer(address))


@row(
    "P9.range",
    "aclrtMemGetAddressRange",
    done="an address within a chunk: its start and its size",
    expected=(True, CHUNK),
    context="a thread with a device",
    since="9.0 (not in the acl_rt.h of 8.5.0)",
    source="acl_rt.h of each tag",
    needed_by="Acl.chunk_bytes where there is one",
)
def address_range(scene: Scene) -> object:
    process = scene.process()
    address, _ = process.mapped_chunk()
    answer = process.call("aclrtMemGetAddressRange", pointer(address + 4096), OUT_POINTER, OUT_SIZE)
    return answer.out[0] == address, answer.out[1]


@row(
    "P10.once",
    "aclrtMemExportToShareableHandle",
    done="in a thread without a device; again; after it was freed and retained again",
    expected=(0, REFUSED, REFUSED),
    owner="one for the chunk's life; no call ends it",
    source=_SHARE + ": Current proc export or import repeatedly",
    needed_by="Exports keeps the handle of a chunk",
)
def once(scene: Scene) -> object:
    process = scene.process()
    address, handle = process.mapped_chunk()
    first, second = process.share(handle, thread=True).code, process.share(handle).code
    retained = process.value(_RETAIN, pointer(address), OUT_POINTER)
    process.code("aclrtFreePhysical", pointer(retained))
    return first, second, process.share(process.value(_RETAIN, pointer(address), OUT_POINTER)).code


@row(
    "P10.pids",
    "aclrtMemSetPidToShareableHandle",
    done="with a whitelist: before and after the importer was admitted; without one: admit",
    expected=(REFUSED, 0, 0, REFUSED),
    source=_SHARE + ":148: EPERM",
    needed_by="handles are exported to any process and go to the broker alone",
)
def admitting(scene: Scene) -> object:
    exporter, importer, _, free = _shared(scene)
    shareable = exporter.share(exporter.chunk().value, flags=0).value
    pids = [importer.tgid()]
    before, admitted = importer.adopt(shareable).code, exporter.admit(shareable, pids)
    return before, admitted, importer.adopt(shareable).code, exporter.admit(free, pids)


@row(
    "P11.import",
    "aclrtMemImportFromShareableHandle",
    done="without a device; import; again: the same handle; its bytes, mapped",
    expected=(REFUSED, 0, 0, True, _BYTES),
    context="a thread with a device",
    owner="one aclrtFreePhysical for each import",
    source="rt 9.0.0 api_impl.cc ImportFromShareableHandle; drv 9.0.0 devmm_svm.c devmm_record_get",
    needed_by="NpuDriver imports a chunk once",
)
def importing(scene: Scene) -> object:
    _, importer, _, shareable = _shared(scene)
    without = importer.adopt(shareable, thread=True).code
    first, again = importer.adopt(shareable), importer.adopt(shareable)
    return without, first.code, again.code, first.value == again.value, _read(importer, int(first.value))


@row(
    "P11.death",
    "aclrtMemImportFromShareableHandle",
    done="the exporter is killed: an importer's bytes; another process imports: its bytes",
    expected=(_BYTES, _BYTES),
    context="a thread with a device",
    owner="the memory lives as long as any process holds it",
    source=_SHARE + ":1134-1215: existence and counter, not that the exporter lives",
    needed_by="chunks never fault; digests guard their content",
)
def outlives(scene: Scene) -> object:
    exporter, importer, _, shareable = _shared(scene)
    handle = int(importer.adopt(shareable).value)
    exporter.kill()
    late = scene.process()
    return _read(importer, handle), _read(late, int(late.adopt(shareable).value))


@row(
    "P11.gone",
    "aclrtMemImportFromShareableHandle",
    done="every holder is killed: import",
    expected=REFUSED,
    context="a thread with a device",
    source=_SHARE + ":690",
    needed_by="a stale handle is refused, not another's memory, until numbers wrap",
)
def gone(scene: Scene) -> object:
    exporter, importer, _, shareable = _shared(scene)
    exporter.kill()
    return importer.adopt(shareable).code


@row(
    "P11.copy",
    "aclrtMemcpy",
    "aclrtMemcpyAsync",
    done="an imported chunk, copied into own memory of its card without a stream; in a stream: its bytes",
    expected=(REFUSED, 0, _BYTES),
    context="a thread with a device",
    source="drv 8.5.0 svm_master_memcpy.c:376, 9.0.0:378: EOPNOTSUPP",
    needed_by="NpuDriver.copy has a stream: an instance is filled on the card of its source",
)
def copied(scene: Scene) -> object:
    _, importer, _, shareable = _shared(scene)
    mapped, own = importer.reserve(), importer.malloc(CHUNK)
    importer.map(mapped, int(importer.adopt(shareable).value))
    ends = pointer(own), size(CHUNK), pointer(mapped), size(CHUNK)
    refused = importer.code("aclrtMemcpy", *ends, i32(WITHIN_DEVICE))
    return refused, importer.copy_in_stream(own, mapped, CHUNK), importer.read(own, 2)[1]


@row(
    "P12",
    "aclrtMemExportToShareableHandle",
    done='visible "1": bits 32 to 39 of the handle of a chunk on device 0',
    expected=1,
    source="drv 9.0.0 devmm_svm.c:5800-5808: the exporter's logical number",
    needed_by="Region.logical_device: chunks of other containers are staged",
)
def container(scene: Scene) -> object:
    process = scene.process(visible="1")
    return int(process.share(process.chunk().value).value) >> 32 & 0xFF


@row(
    "P13",
    "aclrtIpcMemGetExportKey",
    done="of a mapped chunk: import its key; a key after it was exported as a chunk",
    expected=(REFUSED, REFUSED),
    context="a thread with a device",
    source="users: import fails with 507899; drv 9.0.0 is_mem_export: EINVAL",
    needed_by="expandable segments are shared as chunks",
)
def key_of_chunk(scene: Scene) -> object:
    process, importer = scene.process(), scene.process()
    address, handle = process.mapped_chunk()
    _, key = process.export(address, CHUNK)
    refused = importer.import_key(key)[0]
    other, handle = process.mapped_chunk()
    process.share(handle)
    return refused, process.export(other, CHUNK)[0]


@row(
    "M5",
    "aclrtFreePhysical",
    done="a handle twice",
    expected=(0, REFUSED),
    source="acl_rt.h",
    needed_by="_release_chunk",
)
def freed(scene: Scene) -> object:
    process = scene.process()
    handle = process.chunk().value
    return tuple(process.code("aclrtFreePhysical", pointer(handle)) for _ in range(2))


@row(
    "M6",
    "aclrtReserveMemAddress",
    done="no bytes",
    expected=REFUSED,
    context="a thread with a device",
    source="acl_rt.h",
    needed_by="reserve_address",
)
def no_addresses(scene: Scene) -> object:
    arguments = OUT_POINTER, size(0), size(0), pointer(0), u64(1)
    return scene.process().code("aclrtReserveMemAddress", *arguments)
