"""Allocations and copies of one process."""

from __future__ import annotations

from weight_broker.drivers.cuda import IS_IPC_CAPABLE
from weight_brokerd.proof.cuda.scene import BLOCK, KIB, MIB, OUT_I32, CudaScene, address, i32
from weight_brokerd.proof.row import REFUSED, Table

_table: Table[CudaScene] = Table("470")
ROWS, row = _table.rows, _table.row
_HEADER = "cuda.h 12.9"
_IN_CONTEXT = "a thread with a context"


@row(
    "M1",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    done="2 MiB: free, free again; cuMemAlloc of 0 bytes",
    expected=(0, REFUSED, 1),
    context=_IN_CONTEXT,
    owner="free ends the memory at once",
    source=f"{_HEADER}, cuMemAlloc, cuMemFree",
    needed_by="tests only; the product allocates nothing on GPUs",
)
def allocation(scene: CudaScene) -> object:
    process = scene.process()
    at = process.malloc(BLOCK)
    nothing = process.call("cuMemAlloc_v2", ("out u64", 0), ("size", 0)).code
    return process.free(at), process.free(at), nothing


@row(
    "M2",
    "cuMemcpyHtoD_v2",
    "cuMemcpyDtoH_v2",
    "cuMemcpyAsync",
    "cuStreamCreate",
    "cuStreamSynchronize",
    "cuStreamDestroy_v2",
    done="write; copy in a stream, wait, destroy the stream; read: codes, equal bytes",
    expected=(0, 0, 0, 0, 0, True),
    context=f"{_IN_CONTEXT}; a stream belongs to its context",
    owner="a stream is destroyed by its creator",
    source=f"{_HEADER}, cuMemcpyAsync",
    needed_by="CudaDriver.copy, digests",
)
def copies(scene: CudaScene) -> object:
    process = scene.process()
    source, destination = process.malloc(BLOCK), process.malloc(BLOCK)
    return process.write(source), *process.copy(destination, source, BLOCK), *process.read(destination)


@row(
    "G1.range",
    "cuMemGetAddressRange_v2",
    "cuPointerGetAttribute",
    done="20 MiB: attribute 10 (has a legacy handle); base and size of an address inside; of an address that is freed",
    expected=(1, True, 20 * MIB, REFUSED),
    source=f"{_HEADER}, cuMemGetAddressRange, CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE",
    needed_by="export: a tensor's allocation is shared as a whole",
)
def ranges(scene: CudaScene) -> object:
    process = scene.process()
    base = process.malloc(20 * MIB)
    capable = process.value("cuPointerGetAttribute", OUT_I32, i32(IS_IPC_CAPABLE), address(base))
    found = process.range_of(base + 4 * KIB)
    process.free(base)
    return capable, found.out[0] == base, found.out[1], process.range_of(base).code


@row(
    "G1.block",
    "cuMemAlloc_v2",
    done="two allocations of 512 KiB in a fresh process: are they in one block of 2 MiB",
    expected=True,
    source="CUDA C++ programming guide, Interprocess communication: allocations may share a larger block",
    needed_by="docs: a handle may expose neighbours",
)
def block(scene: CudaScene) -> object:
    process = scene.process()
    return process.malloc(512 * KIB) // BLOCK == process.malloc(512 * KIB) // BLOCK


@row(
    "G1.handle",
    "cuIpcGetMemHandle",
    done="the handle of 20 MiB, again, and of an address 512 bytes inside: equal; differs from another allocation's",
    expected=(True, True, True),
    owner="a handle is a name; no call ends it",
    source=f"{_HEADER}, cuIpcGetMemHandle; audit of 2026, row G1",
    needed_by="region_id is a digest of the handle",
)
def handles(scene: CudaScene) -> object:
    process = scene.process()
    base, other = process.malloc(20 * MIB), process.malloc(20 * MIB)
    handle = process.handle(base)
    return handle == process.handle(base), handle == process.handle(base + 512), handle != process.handle(other)
