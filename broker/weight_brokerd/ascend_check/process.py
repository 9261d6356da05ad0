"""A process of `ascend-check` on one card: does single steps, each timed, without a broker.

It uses what the broker's card processes use: the same calls of Ascend's runtime, the same client of the datasystem. A
step is a line of JSON on standard input, its answer one on standard output.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import IO, Any

from weight_broker.drivers import acl
from weight_broker.drivers.acl import AclError, MemcpyKind
from weight_broker.errors import BrokerError
from weight_broker.memory.device.tensor import DeviceTensor, Segment, SegmentKind
from weight_broker.memory.npu import kind as npu
from weight_brokerd.cards.child.engine import Engine, EngineError
from weight_brokerd.cards.child.memory import CardMemory
from weight_brokerd.cards.child.npu import NpuDriver
from weight_brokerd.cards.messages import ImportRegion
from weight_brokerd.cards.plan.blobs import Blob, BlobList, Part
from weight_brokerd.kinds.npu.place import import_region

CHUNK_BYTES = 2 << 20
_CONNECT_MILLISECONDS = 10_000


class _Card:
    """The steps. Sizes are bytes, times seconds."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._runtime = acl.load()
        self._spans: dict[str, list[tuple[int, int]]] = {}
        self._segments: dict[str, Segment] = {}
        self._exported: dict[str, npu.ExportedSegments] = {}
        self._memory: CardMemory | None = None
        self._engine: Engine | None = None

    def open(self) -> dict[str, Any]:
        """Opens the card as the broker's processes do."""
        began = time.monotonic()
        self._runtime.initialize()
        self._runtime.set_device(self._index)
        seconds = time.monotonic() - began
        self._memory = CardMemory(NpuDriver(self._runtime, self._index))
        return {"seconds": seconds, "identity": npu.device_id(self._runtime, self._index)}

    def allocate(self, name: str, size: int, blobs: int, chunks: bool = False) -> dict[str, Any]:
        """Memory of `size` bytes, cut into equal blobs: one allocation, or chunks at consecutive addresses."""
        size = -(-size // (CHUNK_BYTES * blobs)) * CHUNK_BYTES * blobs
        if chunks:
            base = self._runtime.reserve_address(size)
            for at in range(base, base + size, CHUNK_BYTES):
                self._runtime.map(at, CHUNK_BYTES, self._runtime.malloc_physical(CHUNK_BYTES, self._index))
            segment = Segment(base, size, SegmentKind.VMM, CHUNK_BYTES)
        else:
            base = self._runtime.malloc(size)
            segment = Segment(base, size)
        self._segments[name] = segment
        self._spans[name] = [(base + at, size // blobs) for at in range(0, size, size // blobs)]
        pattern = os.urandom(CHUNK_BYTES)
        for at in range(base, base + size, CHUNK_BYTES):
            self._copy_from_host(at, pattern)
        return {"size": size}

    def copy(self, kind: str, size: int, rounds: int) -> dict[str, Any]:
        """Plain copies of the runtime: "device" within the card, "to device", "from device"."""
        source = self._runtime.malloc(size)
        other = self._runtime.malloc(size)
        host = bytearray(size)
        host_address = ctypes.addressof((ctypes.c_char * size).from_buffer(host))
        way = {
            "device": (other, source, MemcpyKind.DEVICE_TO_DEVICE),
            "to device": (source, host_address, MemcpyKind.HOST_TO_DEVICE),
            "from device": (host_address, source, MemcpyKind.DEVICE_TO_HOST),
        }[kind]
        seconds = [_timed(lambda: self._runtime.memcpy(way[0], size, way[1], size, way[2])) for _ in range(rounds)]
        for address in (source, other):
            self._runtime.free(address)
        return {"seconds": seconds}

    def digest(self, name: str, rounds: int) -> dict[str, Any]:
        """The digests that verification compares. Of the runtime's memory they are computed on the host."""
        described = npu.describe_device(self._tensors(name))
        return {"seconds": [_timed(lambda: npu.digest_tensors(described)) for _ in range(rounds)]}

    def digest_by_torch(self, size: int, rounds: int) -> dict[str, Any]:
        """The same of a torch_npu tensor: computed on the card."""
        import torch

        importlib.import_module("torch_npu").npu.set_device(self._index)
        tensor = torch.ones(size, dtype=torch.uint8, device=f"npu:{self._index}")
        described = npu.describe_device({"tensor": tensor})
        return {"seconds": [_timed(lambda: npu.digest_tensors(described)) for _ in range(rounds)]}

    def export(self, name: str) -> dict[str, Any]:
        """Exports the memory to any process; the regions as others import them."""
        described = npu.describe_device(self._tensors(name))
        began = time.monotonic()
        exported = npu.export_segments(described, [self._segments[name]], any_process=True)
        seconds = time.monotonic() - began
        self._exported[name] = exported
        wanted = [import_region("region", region.region_id, region) for region in exported.regions]
        regions = [
            {
                "region_id": one.region_id,
                "size_bytes": one.size_bytes,
                "export_key": one.export_key,
                "shareable_handles": list(one.shareable_handles),
                "chunk_bytes": one.chunk_bytes,
                "container_device": one.container_device,
            }
            for one in wanted
        ]
        return {"seconds": seconds, "regions": regions}

    def unexport(self, name: str) -> dict[str, Any]:
        """Ends the export."""
        return {"seconds": _timed(self._exported.pop(name).close)}

    def import_(self, name: str, regions: list[dict[str, Any]], blobs: int) -> dict[str, Any]:
        """Maps another process's memory, which is `name` here."""
        assert self._memory is not None
        seconds, spans = 0.0, []
        for one in regions:
            region = ImportRegion(**{**one, "shareable_handles": tuple(one["shareable_handles"])})
            began = time.monotonic()
            self._memory.open(region)
            seconds += time.monotonic() - began
            size = region.size_bytes // blobs
            parts = tuple(Blob(size, (Part(0, at, size),)) for at in range(0, region.size_bytes, size))
            spans += [spans[0] for spans in self._memory.resolve(BlobList((region.region_id,), parts))]
        self._spans[name] = spans
        return {"seconds": seconds}

    def unimport(self, regions: list[dict[str, Any]]) -> dict[str, Any]:
        """Unmaps it."""
        memory = self._memory
        assert memory is not None
        return {"seconds": sum(_timed(lambda: memory.close(one["region_id"])) for one in regions)}  # noqa: B023

    def connect(self, host: str, port: int) -> dict[str, Any]:
        """Connects to the datasystem worker, and uses the device once."""
        began = time.monotonic()
        engine = Engine(host, port, self._index, connect_timeout_ms=_CONNECT_MILLISECONDS, credentials={})
        connected = time.monotonic()
        engine.warm_up(self._runtime)
        self._engine = engine
        return {"seconds": connected - began, "warm_up_seconds": time.monotonic() - connected}

    def offer(self, name: str, key: str) -> dict[str, Any]:
        """dev_mset."""
        engine = self._connected()
        return {"seconds": _timed(lambda: engine.offer(key, self._spans[name]))}

    def fetch(self, name: str, key: str, timeout_ms: int) -> dict[str, Any]:
        """dev_mget."""
        engine = self._connected()
        return {"seconds": _timed(lambda: engine.fetch(key, self._spans[name], timeout_ms))}

    def withdraw(self, key: str) -> dict[str, Any]:
        """dev_local_delete."""
        engine = self._connected()
        return {"seconds": _timed(lambda: engine.withdraw(key, 10.0))}

    def content(self, name: str) -> dict[str, Any]:
        """SHA-256 of the memory."""
        state = hashlib.sha256()
        for address, size in self._spans[name]:
            buffer = bytearray(size)
            self._copy_to_host(buffer, address)
            state.update(buffer)
        return {"digest": state.hexdigest()}

    def _connected(self) -> Engine:
        if self._engine is None:
            raise EngineError("this process is not connected")
        return self._engine

    def _tensors(self, name: str) -> dict[str, DeviceTensor]:
        return {
            f"blob {number:05}": DeviceTensor(
                address, "uint8", (size,), (1,), size, self._index, segment=self._segments[name]
            )
            for number, (address, size) in enumerate(self._spans[name])
        }

    def _copy_from_host(self, address: int, content: bytes) -> None:
        host = ctypes.create_string_buffer(content, len(content))
        self._runtime.memcpy(address, len(content), ctypes.addressof(host), len(content), MemcpyKind.HOST_TO_DEVICE)

    def _copy_to_host(self, buffer: bytearray, address: int) -> None:
        host = ctypes.addressof((ctypes.c_char * len(buffer)).from_buffer(buffer))
        self._runtime.memcpy(host, len(buffer), address, len(buffer), MemcpyKind.DEVICE_TO_HOST)


def main(index: int, commands: IO[str], answers: IO[str]) -> None:
    """Does what comes in, one after the other, until the input ends."""
    card = _Card(index)
    for line in commands:
        request = json.loads(line)
        step: Callable[..., dict[str, Any]] = getattr(card, request.pop("do"))
        try:
            answer = {"event": "did", **step(**request)}
        except (AclError, BrokerError, EngineError, OSError, RuntimeError, ImportError) as error:
            answer = {"event": "failed", "problem": " ".join(str(error).split())}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _timed(function: Callable[[], object]) -> float:
    began = time.monotonic()
    function()
    return time.monotonic() - began


if __name__ == "__main__":
    # Whatever a library prints goes to standard error; standard output carries the answers alone.
    private = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    main(int(sys.argv[1]), sys.stdin, private)
    os._exit(0)  # an engine that hangs in its destructor is no concern of the measurement
