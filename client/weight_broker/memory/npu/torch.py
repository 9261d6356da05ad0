"""Everything that is asked of torch_npu, and nothing else is: tests pin each name that is used here.

torch_npu is imported only if the caller passes one of its tensors, when it is there already.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from weight_broker.errors import InvalidArgument
from weight_broker.layout import MemoryFormat
from weight_broker.memory.device.tensor import DeviceTensor, Segment, SegmentKind
from weight_broker.memory.device.torch import plain_tensor

if TYPE_CHECKING:
    import torch

STRIDED_FORMATS = {0: "NCHW", 1: "NHWC", 2: "ND", 30: "NCDHW"}
"""torch_npu.Format: the formats in which shape and stride say everything."""
FRACTAL_FORMATS = {
    29: MemoryFormat.FRACTAL_NZ,
    50: MemoryFormat.FRACTAL_NZ_C0_16,
    51: MemoryFormat.FRACTAL_NZ_C0_32,
    52: MemoryFormat.FRACTAL_NZ_C0_2,
    53: MemoryFormat.FRACTAL_NZ_C0_4,
    54: MemoryFormat.FRACTAL_NZ_C0_8,
}
"""torch_npu.Format: formats of whole storages."""
ND = 2
_DEFAULT_POOL = (0, 0)


def from_tensor(name: str, tensor: torch.Tensor) -> DeviceTensor:
    """A torch tensor on an NPU. Raises `InvalidArgument` that names it."""
    torch_npu = _torch_npu()
    plain = plain_tensor(name, tensor)
    number = int(torch_npu.get_npu_format(tensor))
    memory_format = FRACTAL_FORMATS.get(number, MemoryFormat.STRIDED)
    if memory_format is not MemoryFormat.STRIDED:
        storage_bytes = int(torch_npu.get_storage_size(tensor)) * tensor.element_size()
        if plain.offset:
            hint = "Share the tensor that it is a part of."
            raise _refusal(name, "storage_offset", plain.offset, "0: FRACTAL_NZ is a format of whole storages", hint)
    elif number in STRIDED_FORMATS:
        storage_bytes = tensor.numel() * tensor.element_size()
    else:
        expected = "FRACTAL_NZ or one of " + ", ".join(STRIDED_FORMATS.values())
        raise _refusal(name, "format", number, expected, f"Use torch_npu.npu_format_cast(tensor, {ND}).")
    plain.require(name, storage_bytes)
    return DeviceTensor(
        address=plain.address if storage_bytes else 0,
        dtype=plain.dtype,
        shape=tuple(tensor.shape),
        stride=tuple(tensor.stride()),
        storage_bytes=storage_bytes,
        device_index=tensor.device.index or 0,
        memory_format=memory_format,
        storage_offset=plain.offset,
        owner=tensor,
    )


def segments(device_index: int) -> list[Segment]:
    """The allocator's segments on a device. Of an expandable segment, each run of mapped chunks is one."""
    return [
        Segment(
            base=row["address"],
            size=row["total_size"],
            kind=SegmentKind.VMM if row.get("is_expandable") else SegmentKind.PLAIN,
            device_index=row["device"],
            sleeps=tuple(row.get("segment_pool_id", _DEFAULT_POOL)) != _DEFAULT_POOL,
        )
        for row in _torch_npu().npu.memory_snapshot()
        if row["device"] == device_index
    ]


def synchronize(device_index: int) -> None:
    """Submits what torch_npu's own task queue holds and waits for the device. Waiting through ACL alone would miss what
    is still in that queue."""
    _torch_npu().npu.synchronize(device_index)


def _torch_npu() -> Any:
    return importlib.import_module("torch_npu")


def _refusal(name: str, field: str, value: object, expected: str, hint: str) -> InvalidArgument:
    return InvalidArgument(f"tensors[{name}].{field}", value, expected, hint=hint)
