"""The calls of torch that concern the memory of a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weight_broker.memory.device.tensor import DeviceTensor, Segment, SegmentKind
from weight_broker.memory.device.torch import plain_tensor

if TYPE_CHECKING:
    import torch


def from_tensor(name: str, tensor: torch.Tensor) -> DeviceTensor:
    """A torch tensor on a GPU. Raises `InvalidArgument` that names it."""
    plain = plain_tensor(name, tensor)
    storage_bytes = tensor.numel() * tensor.element_size()
    plain.require(name, storage_bytes)
    return DeviceTensor(
        address=plain.address if storage_bytes else 0,
        dtype=plain.dtype,
        shape=tuple(tensor.shape),
        stride=tuple(tensor.stride()),
        storage_bytes=storage_bytes,
        device_index=tensor.device.index or 0,
        storage_offset=plain.offset,
        owner=tensor,
        device_kind="cuda",
    )


def segments(device_index: int) -> list[Segment]:
    """The caching allocator's segments on a device. The driver says what can be shared; segments explain why memory
    cannot."""
    import torch

    rows: list[dict[str, Any]] = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    return [
        Segment(
            base=row["address"],
            size=row["total_size"],
            kind=SegmentKind.VMM if row.get("is_expandable") else SegmentKind.PLAIN,
            device_index=row["device"],
        )
        for row in rows
        if row["device"] == device_index
    ]


def synchronize(device_index: int) -> None:
    """Waits for the device."""
    import torch

    torch.cuda.synchronize(device_index)


def current_stream(device_index: int) -> int:
    """torch's current stream in this thread."""
    import torch

    stream: int = torch.cuda.current_stream(device_index).cuda_stream
    return stream
