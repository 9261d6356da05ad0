"""Memory of another process of the same user and the same namespaces."""

from __future__ import annotations

from weight_brokerd.proof.cuda.scene import BLOCK, KIB, MIB, OUT_ADDRESS, PATTERN, CudaScene, u32
from weight_brokerd.proof.processes import NotRun
from weight_brokerd.proof.row import REFUSED, UNKNOWN, Table

_table: Table[CudaScene] = Table("470")
ROWS, row = _table.rows, _table.row
_OPEN = "cuda.h 12.9, cuIpcOpenMemHandle"
_OTHER = PATTERN[::-1]
_SIZES = (146064, 226656, 154909264)
"""Three allocations that drivers 455 and 460 map wrongly."""


@row(
    "G2.open",
    "cuIpcOpenMemHandle_v2",
    "cuIpcCloseMemHandle",
    done="open, again: codes, the same address; bytes; close twice, once more",
    expected=(0, 0, True, 0, True, 0, 0, REFUSED),
    context="a context of the memory's own GPU is current, for open and for close",
    owner="each open has one close; the exporter frees after the last",
    source=_OPEN,
    needed_by="CudaDriver.map",
)
def opening(scene: CudaScene) -> object:
    _, handle = scene.shared()
    importer = scene.process()
    first, second = importer.open(handle), importer.open(handle)
    same = first.value == second.value
    read = importer.read(first.value)
    return first.code, second.code, same, *read, *(importer.close(first.value) for _ in range(3))


@row(
    "G2.copy",
    "cuMemcpyAsync",
    done="copy from opened memory, and to opened memory: codes; the exporter reads what was written",
    expected=(0, 0, 0, True, 0, 0, 0, 0, True),
    context="a thread with a context",
    source=_OPEN,
    needed_by="every transfer between GPU instances",
)
def copies(scene: CudaScene) -> object:
    exporter = scene.process()
    shared = exporter.malloc(BLOCK)
    exporter.write(shared)
    importer = scene.process()
    opened, own = importer.opened(exporter.handle(shared)), importer.malloc(BLOCK)
    from_it = importer.copy(own, opened, BLOCK)
    _, is_equal = importer.read(own)
    importer.write(own, _OTHER)
    return *from_it, is_equal, *importer.copy(opened, own, BLOCK), *exporter.read(shared, _OTHER)


@row(
    "G2.sizes",
    "cuIpcOpenMemHandle_v2",
    done=f"allocations of {_SIZES} bytes, all open at once: is each the one that was meant, at its beginning and end",
    expected=(True,) * 6,
    source="a known fault of drivers 455 and 460; 470 is the product's floor",
    needed_by="the floor of the driver",
)
def sizes(scene: CudaScene) -> object:
    exporter, importer = scene.process(), scene.process()
    patterns = [f"{index + 1:016x}" for index in range(len(_SIZES))]
    bases = [exporter.malloc(count) for count in _SIZES]
    for base, count, pattern in zip(bases, _SIZES, patterns, strict=True):
        exporter.write(base, pattern)
        exporter.write(base + count - len(pattern) // 2, pattern)
    opened = [importer.opened(exporter.handle(base)) for base in bases]
    found: list[bool] = []
    for at, count, pattern in zip(opened, _SIZES, patterns, strict=True):
        found += [importer.read(at, pattern)[1], importer.read(at + count - len(pattern) // 2, pattern)[1]]
    return tuple(found)


@row(
    "G2.neighbour",
    "cuIpcOpenMemHandle_v2",
    done="two allocations of 512 KiB in one block, the first one's handle opened: are the second one's bytes there",
    expected=(0, True),
    source="CUDA C++ programming guide, Interprocess communication",
    needed_by="docs: what a handle of a small allocation exposes",
)
def neighbour(scene: CudaScene) -> object:
    exporter, importer = scene.process(), scene.process()
    first, second = exporter.malloc(512 * KIB), exporter.malloc(512 * KIB)
    if first // BLOCK != second // BLOCK:
        raise NotRun("the two allocations lie in different blocks")
    exporter.write(second, _OTHER)
    return importer.read(importer.opened(exporter.handle(first)) + second - first, _OTHER)


@row(
    "G2.flags",
    "cuIpcOpenMemHandle_v2",
    done="open with flags 0; bytes that are no handle",
    expected=(REFUSED, REFUSED),
    source=_OPEN,
    needed_by="Cuda.ipc_open passes LAZY_ENABLE_PEER_ACCESS",
)
def flags(scene: CudaScene) -> object:
    _, handle = scene.shared()
    importer = scene.process()
    return importer.open(handle, 0).code, importer.open("ff" * 64).code


@row(
    "G3",
    "cuIpcOpenMemHandle_v2",
    done="the exporter opens its own handle",
    expected=201,
    source="cuda.h 12.9, cuIpcOpenMemHandle; NVIDIA/cuda-samples simpleIPC",
    needed_by="the broker opens memory in other processes than the exporter",
)
def own(scene: CudaScene) -> object:
    exporter, handle = scene.shared()
    return exporter.open(handle).code


@row(
    "G6.killed",
    "cuIpcOpenMemHandle_v2",
    done="the exporter is killed while its memory is open: code of a read, equal bytes; close; open once more",
    expected=(0, True, 0, REFUSED),
    owner="the memory lives until the last importer closes",
    source="audit of 2026, D7: memory stays until closed; the code of a late open is in no document",
    needed_by="an instance that dies during a transfer costs that transfer only",
)
def killed(scene: CudaScene) -> object:
    exporter, handle = scene.shared()
    importer = scene.process()
    opened = importer.opened(handle)
    exporter.kill()
    return *importer.read(opened), importer.close(opened), importer.open(handle).code


@row(
    "G8.copy",
    "cuMemcpyAsync",
    done="memory of the second GPU, opened in its context, is copied to the first: codes, equal bytes",
    expected=(0, 0, 0, 0, True),
    source="cuda.h 12.9, cuMemcpyAsync: addresses name their GPU",
    needed_by="one process copies between any two GPUs of a host",
)
def between(scene: CudaScene) -> object:
    importer = scene.two_devices()
    exporter = scene.process(1)
    at = exporter.malloc(20 * MIB)
    exporter.write(at)
    importer.open_device(1)
    opened = importer.opened(exporter.handle(at))
    importer.open_device(0)
    destination = importer.malloc(20 * MIB)
    return *importer.copy(destination, opened, 20 * MIB), *importer.read(destination)


@row(
    "G8.context",
    "cuIpcOpenMemHandle_v2",
    done="memory of the second GPU is opened in the first one's context",
    expected=REFUSED,
    source=f"{UNKNOWN}. cuda.h says that LAZY_ENABLE_PEER_ACCESS enables peer access",
    needed_by="a context on every GPU whose memory is opened; without this rule one would do",
)
def in_other_context(scene: CudaScene) -> object:
    importer = scene.two_devices()
    exporter = scene.process(1)
    importer.open_device(0)
    handle = exporter.handle(exporter.malloc(BLOCK))
    return importer.call("cuIpcOpenMemHandle_v2", OUT_ADDRESS, ("value", handle), u32(1)).code
