"""Packing tensors whose elements leave gaps (columns of a wider matrix, for example) into row-major order, and back.

Elements are moved as integers of their size: every data type, every bit pattern, no autograd.
"""

from __future__ import annotations

from typing import Any

from weight_broker.layout import ITEM_SIZES, TensorSpec
from weight_broker.memory.host.address_space import buffer_at

_TORCH_TYPES = {1: "uint8", 2: "int16", 4: "int32", 8: "int64", 16: "complex128"}


def pack(spec: TensorSpec, tensor_address: int, packed_address: int, framework: str) -> None:
    """Copy the elements of a tensor with gaps into `spec.content_bytes` bytes of row-major memory."""
    _copy(spec, tensor_address, packed_address, framework, packing=True)


def unpack(spec: TensorSpec, packed_address: int, tensor_address: int, framework: str) -> None:
    """Copy row-major elements into a tensor with gaps; the gaps stay unchanged."""
    _copy(spec, tensor_address, packed_address, framework, packing=False)


def _copy(spec: TensorSpec, tensor_address: int, packed_address: int, framework: str, *, packing: bool) -> None:
    item_size = ITEM_SIZES[spec.dtype]
    with_gaps: Any = buffer_at(tensor_address, spec.storage_bytes)
    packed: Any = buffer_at(packed_address, spec.element_count * item_size)
    if framework == "torch":
        import torch

        item = getattr(torch, _TORCH_TYPES[item_size])
        with_gaps = torch.frombuffer(with_gaps, dtype=item).as_strided(spec.shape, spec.stride)
        packed = torch.frombuffer(packed, dtype=item).view(spec.shape)
        if packing:
            packed.copy_(with_gaps)
        else:
            with_gaps.copy_(packed)
        return
    import numpy

    item = f"V{item_size}"
    with_gaps = numpy.ndarray(spec.shape, item, with_gaps, strides=[step * item_size for step in spec.stride])
    packed = numpy.ndarray(spec.shape, item, packed)
    if packing:
        numpy.copyto(packed, with_gaps)
    else:
        numpy.copyto(with_gaps, packed)
