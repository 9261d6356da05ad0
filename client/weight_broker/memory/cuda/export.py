"""Shares the allocations that hold tensors with the broker's card processes, which open them for each transfer.

The driver says which allocation holds a tensor, independent of the allocator. An allocation is shared as a whole. A
handle is a name and cannot be revoked: memory may be freed once the broker has closed it, which it does before a
retract returns.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from weight_broker.drivers import cuda as cuda_module
from weight_broker.drivers.cuda import Cuda, CudaError
from weight_broker.errors import PublishRefused
from weight_broker.memory.described import DescribedTensor
from weight_broker.memory.device.describe import DescribedDeviceTensors
from weight_broker.memory.device.tensor import SegmentKind

if TYPE_CHECKING:
    from weight_broker.v1 import weight_set_pb2 as pb

_VMM_OFF = "Set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False"


class ExportedAllocations:
    """The regions of a set of tensors."""

    def __init__(self, regions: Iterable[pb.Region], placements: Iterable[tuple[int, int]]) -> None:
        self.regions = tuple(regions)
        self.placements = tuple(placements)
        """(index of the region, offset in bytes) of each tensor in the layout's order; an alias has its target's."""

    def close(self) -> None:
        """Nothing to do: a handle cannot be revoked."""


def export_allocations(described: DescribedDeviceTensors, *, cuda: Cuda | None = None) -> ExportedAllocations:
    """Wait for the device and export the memory that the tensors lie in.

    Raises `PublishRefused` with the reason and the fix.
    """
    with _driver_errors("start", "Can this process use the GPU?"):
        cuda = cuda or cuda_module.load()
    if described.synchronize is not None:
        described.synchronize()
    regions: dict[int, tuple[int, pb.Region]] = {}
    placements: list[tuple[int, int]] = []
    with (
        _driver_errors("share the memory", "Did an operation fail before this?"),
        cuda.on_device(described.device_index),
    ):
        cuda.synchronize()
        card = cuda.device_id(described.device_index)
        for tensor in described.tensors:
            if not tensor.spec.storage_bytes:
                placements.append((0, 0))
                continue
            base, size = _allocation(cuda, described, tensor)
            if base not in regions:
                regions[base] = len(regions), _region(cuda, card, base, size)
            placements.append((regions[base][0], tensor.address - base))
    return ExportedAllocations((region for _, region in regions.values()), placements)


def _allocation(cuda: Cuda, described: DescribedDeviceTensors, tensor: DescribedTensor) -> tuple[int, int]:
    if not cuda.is_ipc_capable(tensor.address):
        raise PublishRefused(
            f"tensor {tensor.spec.name!r} at {tensor.address:#x} {_why_not(described, tensor.address)}",
            metadata={"tensor": tensor.spec.name},
        )
    base, size = cuda.allocation_of(tensor.address)
    end = tensor.address + tensor.spec.storage_bytes
    if end > base + size:
        raise PublishRefused(
            f"tensor {tensor.spec.name!r} ends at {end:#x}, behind its allocation of {size} bytes at {base:#x}; "
            "was its memory freed?",
            metadata={"tensor": tensor.spec.name},
        )
    return base, size


def _why_not(described: DescribedDeviceTensors, address: int) -> str:
    segments = described.segments() if described.segments is not None else ()
    if any(part.kind is SegmentKind.VMM and part.base <= address < part.end for part in segments):
        return f"is in an expandable segment, which cannot be shared by a handle. {_VMM_OFF}."
    return (
        "is in memory that cannot be shared by a handle: it is mapped (expandable segments, an engine's sleep mode) or "
        f"comes from a pool (cudaMallocAsync). {_VMM_OFF},backend:native and start the engine without sleep mode."
    )


def _region(cuda: Cuda, card: str, base: int, size: int) -> pb.Region:
    from weight_broker.v1 import weight_set_pb2 as pb

    handle = cuda.ipc_handle(base)
    # The same memory has the same id in every publication of this process.
    material = b"%d/%s/%d/%d/%s" % (os.getpid(), card.encode(), base, size, handle)
    return pb.Region(
        region_id="cuda-" + hashlib.sha256(material).hexdigest()[:32],
        device_kind=pb.DEVICE_KIND_CUDA,
        size_bytes=size,
        device_id=card,
        cuda_allocation=pb.CudaAllocation(ipc_handle=handle),
    )


@contextmanager
def _driver_errors(intention: str, fix: str) -> Iterator[None]:
    try:
        yield
    except CudaError as error:
        raise PublishRefused(
            f"NVIDIA's driver does not {intention}: {error}. {fix}",
            metadata={"call": error.call, "code": str(error.code)},
        ) from error
