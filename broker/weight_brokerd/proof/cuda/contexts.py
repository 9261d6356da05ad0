"""Contexts: which thread has which, how often they are retained, and what peers may do."""

from __future__ import annotations

from weight_brokerd.proof.cuda.scene import (
    MIB,
    NULL,
    OUT_ADDRESS,
    OUT_I32,
    OUT_POINTER,
    CudaScene,
    i32,
    pointer,
    size,
    u32,
)
from weight_brokerd.proof.processes import NotRun
from weight_brokerd.proof.row import REFUSED, Table

_table: Table[CudaScene] = Table("470")
ROWS, row = _table.rows, _table.row
_HEADER = "cuda.h 12.9"
_INVALID_CONTEXT = 201
_COMPUTE_MODE, _EXCLUSIVE_PROCESS = 20, 3


@row(
    "C1",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    done="retain twice: codes, the same context; release twice; release again",
    expected=(0, 0, True, 0, 0, REFUSED),
    owner="each retain has one release; the last destroys what is in the context",
    source=f"{_HEADER}, cuDevicePrimaryCtxRelease",
    needed_by="Cuda.on_device beside torch, which retains too",
)
def retaining(scene: CudaScene) -> object:
    process = scene.initialised()
    device = i32(process.device())
    first, second = (process.call("cuDevicePrimaryCtxRetain", OUT_POINTER, device) for _ in range(2))
    released = (process.code("cuDevicePrimaryCtxRelease_v2", device) for _ in range(3))
    return first.code, second.code, first.value == second.value, *released


@row(
    "C2",
    "cuCtxSetCurrent",
    "cuCtxPushCurrent_v2",
    "cuCtxPopCurrent_v2",
    "cuCtxSynchronize",
    done="cuMemAlloc without a context; after SetCurrent, in a fresh thread; push and pop: codes, the context; "
    "cuCtxSynchronize with it and without",
    expected=(_INVALID_CONTEXT, 0, _INVALID_CONTEXT, 0, 0, True, 0, _INVALID_CONTEXT),
    context="a context is current in one thread; a fresh thread has none",
    source=f"{_HEADER}, cuCtxSetCurrent",
    needed_by="card processes answer in several threads",
)
def current(scene: CudaScene) -> object:
    process = scene.initialised()
    malloc = ("cuMemAlloc_v2", OUT_ADDRESS, size(MIB))
    without = process.code(*malloc)
    context = process.open_device()
    allocated, in_thread = process.code(*malloc), process.code(*malloc, thread=True)
    pushed = process.code("cuCtxPushCurrent_v2", pointer(context))
    popped = process.call("cuCtxPopCurrent_v2", OUT_POINTER)
    waited = process.code("cuCtxSynchronize")
    process.code("cuCtxSetCurrent", NULL)
    ended = process.code("cuCtxSynchronize")
    return without, allocated, in_thread, pushed, popped.code, popped.value == context, waited, ended


@row(
    "C3",
    "cuDevicePrimaryCtxRetain",
    done="in compute mode EXCLUSIVE_PROCESS: a second process retains; after the first has ended",
    expected=(46, 0),
    source=f"{_HEADER}, CU_COMPUTEMODE_EXCLUSIVE_PROCESS, CUDA_ERROR_DEVICE_UNAVAILABLE",
    needed_by="a GPU in this mode is degraded, with these words",
)
def exclusive(scene: CudaScene) -> object:
    first, second = scene.initialised(), scene.initialised()
    if first.attribute(_COMPUTE_MODE) != _EXCLUSIVE_PROCESS:
        raise NotRun("the compute mode is not EXCLUSIVE_PROCESS")
    first.open_device()
    retain = ("cuDevicePrimaryCtxRetain", OUT_POINTER, i32(second.device()))
    refused = second.code(*retain)
    first.kill()
    return refused, second.code(*retain)


@row(
    "G8.peers",
    "cuDeviceCanAccessPeer",
    "cuCtxEnablePeerAccess",
    done="a GPU as its own peer; peer access to the second GPU, again",
    expected=(0, 0, 704),
    context="the context that is to reach the peer is current",
    source=f"{_HEADER}, cuDeviceCanAccessPeer, cuCtxEnablePeerAccess",
    needed_by="copies between GPUs without the host in between",
)
def peers(scene: CudaScene) -> object:
    process = scene.two_devices()
    own, peer = i32(process.device(0)), i32(process.device(1))
    itself = process.value("cuDeviceCanAccessPeer", OUT_I32, own, own)
    if not process.value("cuDeviceCanAccessPeer", OUT_I32, own, peer):
        raise NotRun("the first two GPUs cannot access each other")
    there = process.open_device(1)
    process.open_device(0)
    enabled = (process.code("cuCtxEnablePeerAccess", pointer(there), u32(0)) for _ in range(2))
    return itself, *enabled
