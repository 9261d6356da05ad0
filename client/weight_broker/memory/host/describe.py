"""Describes torch tensors and NumPy arrays in host memory. Imports neither library."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from weight_broker.errors import InvalidArgument
from weight_broker.kinds import TRAITS, MemoryKind
from weight_broker.layout import ITEM_SIZES, TensorSpec
from weight_broker.memory.described import DescribedTensor, DescribedTensors, layout_of, refusal

if TYPE_CHECKING:
    import numpy
    import torch


def describe_host(tensors: Mapping[str, object]) -> DescribedTensors:
    """Describe torch tensors and NumPy arrays by name. Raises `InvalidArgument` that names the tensor."""
    torch_tensor = getattr(sys.modules.get("torch"), "Tensor", None)
    numpy_array = getattr(sys.modules.get("numpy"), "ndarray", None)
    described: list[DescribedTensor] = []
    targets: dict[tuple[object, ...], str] = {}
    for name in sorted(tensors):
        value: Any = tensors[name]
        if torch_tensor is not None and isinstance(value, torch_tensor):
            described.append(_describe_torch(name, value, targets))
        elif numpy_array is not None and isinstance(value, numpy_array):
            described.append(_describe_numpy(name, value, targets))
        else:
            raise refusal(name, "type", type(value).__name__, "a torch.Tensor or a numpy.ndarray")
    return DescribedTensors(layout_of([tensor.spec for tensor in described]), tuple(described), MemoryKind.CPU.value)


def _describe_torch(name: str, tensor: torch.Tensor, targets: dict[tuple[object, ...], str]) -> DescribedTensor:
    torch_strided, dtype_names = _torch_names()
    if tensor.device.type != MemoryKind.CPU:
        raise _other_device(name, tensor)
    if tensor.layout is not torch_strided:
        raise refusal(name, "layout", tensor.layout, "torch.strided", "Use .to_dense().")
    dtype = dtype_names.get(tensor.dtype)
    if dtype is None:
        hint = (
            "Share its int_repr(), its scales and its zero points as separate tensors."
            if tensor.is_quantized
            else "Share the memory as integers of whole bytes."
        )
        raise refusal(name, "dtype", tensor.dtype, "one of " + ", ".join(ITEM_SIZES), hint)
    try:
        lazy = tensor.is_neg() or tensor.is_conj()
        shape, stride, offset = tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())
        available = tensor.untyped_storage().nbytes()
        address = tensor.data_ptr()
    except (RuntimeError, ValueError) as error:  # uninitialised parameters and wrappers without memory say so this way
        raise refusal(name, "memory", "not there", "a tensor with memory", "Materialise it first.") from error
    if lazy:
        raise refusal(
            name, "memory", "a lazy conjugate or negative", "plain memory", "Use .resolve_conj().resolve_neg()."
        )
    item_size = ITEM_SIZES[dtype]
    count = tensor.numel()
    storage_bytes = count * item_size if tensor.is_contiguous() else _span_bytes(name, shape, stride, count, item_size)
    if storage_bytes and (address == 0 or offset * item_size + storage_bytes > available):
        raise refusal(
            name,
            "memory",
            f"{available} bytes",
            f"a storage of {storage_bytes} bytes",
            "Its storage was freed or resized.",
        )
    return _described(name, dtype, shape, stride, storage_bytes, offset, address, targets, tensor, "torch")


def _other_device(name: str, tensor: torch.Tensor) -> InvalidArgument:
    hint = "Give it memory first, for example with to_empty()." if tensor.is_meta else "Use .cpu()."
    return refusal(name, "device", str(tensor.device), "a device of kind " + " or ".join(TRAITS), hint)


@cache
def _torch_names() -> tuple[object, Mapping[object, str]]:
    torch = sys.modules["torch"]
    # Older versions lack some of the types.
    return torch.strided, {getattr(torch, name): name for name in ITEM_SIZES if hasattr(torch, name)}


def _describe_numpy(name: str, array: numpy.ndarray, targets: dict[tuple[object, ...], str]) -> DescribedTensor:
    if hasattr(array, "mask"):
        raise refusal(
            name, "type", type(array).__name__, "an array without a mask", "Share its data and mask as two arrays."
        )
    dtype, item_size = array.dtype.name, array.dtype.itemsize
    if not array.dtype.isnative:
        raise refusal(
            name, "dtype", array.dtype.str, "native byte order", "Use array.astype(array.dtype.newbyteorder('='))."
        )
    if array.dtype.names is not None or ITEM_SIZES.get(dtype) != item_size:
        raise refusal(name, "dtype", array.dtype, "one of " + ", ".join(ITEM_SIZES))
    shape = array.shape
    if any(step % item_size for step in array.strides):
        raise refusal(
            name, "strides", array.strides, f"multiples of {item_size} bytes", "Use numpy.ascontiguousarray()."
        )
    stride = tuple(step // item_size for step in array.strides)
    if array.flags.c_contiguous:
        storage_bytes = array.nbytes
    else:
        if any(step < 0 for step in stride):
            raise refusal(name, "strides", array.strides, "strides of 0 or more", "Use numpy.ascontiguousarray().")
        storage_bytes = _span_bytes(name, shape, stride, array.size, item_size)
    address: int = array.__array_interface__["data"][0]
    described = _described(name, dtype, shape, stride, storage_bytes, 0, address, targets, array, "numpy")
    described.read_only = not array.flags.writeable
    return described


def _described(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    storage_bytes: int,
    offset: int,
    address: int,
    targets: dict[tuple[object, ...], str],
    owner: object,
    framework: str,
) -> DescribedTensor:
    alias_of = ""
    if storage_bytes:
        target = targets.setdefault((address, dtype, shape, stride), name)
        alias_of = target if target != name else ""
    spec = TensorSpec(name, dtype, shape, stride, storage_bytes, offset, alias_of=alias_of)
    return DescribedTensor(spec, address if storage_bytes else 0, owner, framework)


def _span_bytes(name: str, shape: tuple[int, ...], stride: tuple[int, ...], count: int, item_size: int) -> int:
    """Bytes from the first to the last element; raises `InvalidArgument` if elements may share memory."""
    if count == 0:
        return 0
    reach = 0
    for step, size in sorted((step, size) for size, step in zip(shape, stride, strict=True) if size > 1):
        # A step has to lead past everything that the smaller steps can reach.
        if step <= reach:
            raise refusal(name, "stride", stride, "elements that do not overlap", "Use .contiguous() or numpy.array().")
        reach += (size - 1) * step
    return (reach + 1) * item_size
