"""What sharing costs. Numbers, and no source says any."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from weight_brokerd.ascend_check.contract.driver import CHUNK, DriverProcess, Scene, pointer
from weight_brokerd.ascend_check.contract.machine.peers import free_bytes
from weight_brokerd.ascend_check.contract.row import UNKNOWN, rows

ROWS, row = rows()
BYTES_VARIABLE = "WEIGHT_BROKER_PROOF_BYTES"
"""How much memory is shared in one piece: 1 GiB, or less where memory is scarce."""


def large(scene: Scene) -> int:
    """Bytes."""
    return int(scene.environment.get(BYTES_VARIABLE) or os.environ.get(BYTES_VARIABLE) or 1 << 30)


def _milliseconds(action: Callable[[], object]) -> float:
    began = time.monotonic()
    action()
    return round((time.monotonic() - began) * 1000, 1)


@row(
    "P15.context",
    "aclrtSetDevice",
    "aclrtGetMemInfo",
    done="milliseconds until a process has card 0; MiB of the card that it takes",
    expected=UNKNOWN,
    source="unknown",
    needed_by="how many processes the broker has on a card, and when it starts them",
)
def context(scene: Scene) -> object:
    watcher = scene.process()
    before = free_bytes(watcher)
    spent = _milliseconds(scene.process)
    return spent, (before - free_bytes(watcher)) >> 20


@row(
    "P15.key",
    "aclrtIpcMemImportByKey",
    done="milliseconds for one large allocation (1 GiB): export, import, close",
    expected=UNKNOWN,
    context="a thread with a device",
    source="unknown",
    needed_by="time of a publication and of a transfer, plain allocations",
)
def plain(scene: Scene) -> object:
    exporter, importer = scene.process(), scene.process()
    count = large(scene)
    address, keys = exporter.malloc(count), list[str]()
    export = _milliseconds(lambda: keys.append(exporter.export(address, count)[1]))
    return (
        export,
        _milliseconds(lambda: importer.import_key(keys[0])),
        _milliseconds(lambda: importer.close_key(keys[0])),
    )


@row(
    "P15.chunks",
    "aclrtMemImportFromShareableHandle",
    done="milliseconds for 100 chunks of 2 MiB: export, import and map, unmap and release",
    expected=UNKNOWN,
    context="a thread with a device",
    source="unknown",
    needed_by="time of a publication and of a transfer, expandable segments",
)
def chunks(scene: Scene) -> object:
    exporter, importer = scene.process(), scene.process()
    handles = [exporter.chunk().value for _ in range(100)]
    shared = list[int]()
    export = _milliseconds(lambda: shared.extend(int(exporter.share(handle).value) for handle in handles))
    base, adopted = importer.reserve(100 * CHUNK), list[int]()
    return (
        export,
        _milliseconds(lambda: adopted.extend(_map(importer, base, at, one) for at, one in enumerate(shared))),
        _milliseconds(lambda: _release(importer, base, adopted)),
    )


def _map(process: DriverProcess, base: int, at: int, shareable: int) -> int:
    handle = int(process.adopt(shareable).value)
    process.map(base + at * CHUNK, handle)
    return handle


def _release(process: DriverProcess, base: int, handles: list[int]) -> None:
    for at, handle in enumerate(handles):
        process.code("aclrtUnmapMem", pointer(base + at * CHUNK))
        process.code("aclrtFreePhysical", pointer(handle))


@row(
    "P9.sizes",
    "aclrtMallocPhysical",
    "aclrtMemGetAllocationGranularity",
    done="chunks of 2 MiB, 20 MiB and 1 GiB with huge pages (attribute 4), of 1 GiB with pages of 1 GiB (10): codes",
    expected=(0, 0, UNKNOWN, UNKNOWN),
    source="rt 9.0.0 aclrt_impl/memory.cpp memAttrHandlers; torch_npu: page_size:1g",
    needed_by="chunks are shared whatever their size",
)
def sizes(scene: Scene) -> object:
    asked = (CHUNK, 4), (10 * CHUNK, 4), (1 << 30, 4), (1 << 30, 10)
    return tuple(_code(scene.process(), count, attribute) for count, attribute in asked)


def _code(process: DriverProcess, count: int, attribute: int) -> int:
    arguments = ("out ptr", 0), ("size", count), ("chunk", [attribute, 0]), ("u64", 0)
    return process.code("aclrtMallocPhysical", *arguments)
