"""What the caller's tensors are and where they lie, whichever framework they come from.

PyTorch and NumPy are used only if the caller passes their tensors; nothing here imports them first.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from weight_broker.errors import InvalidArgument
from weight_broker.layout import ITEM_SIZES, Layout, TensorSpec
from weight_broker.memory.device.tensor import DeviceTensor

if TYPE_CHECKING:
    import numpy
    import torch

_KEPT_TENSORS = 20_000
"""A layout with more tensors is not kept: a few megabytes at most."""
_last_layout: Layout | None = None

DEVICE_KINDS = ("cpu", "npu", "cuda")
"""Kinds of devices whose memory can be shared."""


class _OnDevice(Exception):
    """A tensor is in device memory, which is described in device_describe.py."""


@dataclass(slots=True)
class DescribedTensor:
    """One tensor of the caller's."""

    spec: TensorSpec
    address: int
    """Lowest address of its elements; 0 if it has none."""
    owner: object
    """The tensor itself, which keeps the memory alive."""
    framework: str
    """"torch", "numpy", or "device" for device memory of whichever framework."""
    read_only: bool = False
    """True if its memory must not be written."""


@dataclass(slots=True)
class DescribedTensors:
    """A set of tensors, described; it keeps them alive."""

    layout: Layout
    tensors: tuple[DescribedTensor, ...]
    """In the layout's order."""
    device_kind: str
    """Kind of the device that all of them are on."""

    def require_writable(self) -> None:
        """Raise `InvalidArgument` if one of the tensors cannot be filled."""
        for tensor in self.tensors:
            if tensor.read_only:
                raise _refusal(tensor.spec.name, "memory", "read-only", "a writable array", "Use numpy.array(array).")

    def require_host_memory(self) -> None:
        """Raise `InvalidArgument` unless the processor can reach the tensors. What copies through addresses calls it:
        a device's addresses mean nothing to the processor, or something else."""
        if self.device_kind != "cpu":
            raise InvalidArgument("tensors.device", self.device_kind, "host memory (cpu)", hint="Use .cpu().")


def describe(tensors: Mapping[str, object]) -> DescribedTensors:
    """Describe torch tensors, NumPy arrays or device tensors by name. Tensors that are one another's exact aliases
    (same address, type, shape and stride) are found; the first name in sorted order is the one the others point to.
    For tensors on a device the answer is a `weight_broker.memory.device.describe.DescribedDeviceTensors`.

    Raises `InvalidArgument` that names the tensor and says what to do about it.
    """
    if not isinstance(tensors, Mapping):
        raise InvalidArgument("tensors", type(tensors).__name__, "a mapping of names to tensors")
    for name in tensors:
        if not isinstance(name, str):
            raise InvalidArgument("tensors", name, "a mapping whose names are texts")
    try:
        return _describe_on_host(tensors)
    except _OnDevice:
        from weight_broker.memory.device.describe import describe_device

        return describe_device(tensors)


def _describe_on_host(tensors: Mapping[str, object]) -> DescribedTensors:
    torch_tensor = getattr(sys.modules.get("torch"), "Tensor", None)
    numpy_array = getattr(sys.modules.get("numpy"), "ndarray", None)
    described: list[DescribedTensor] = []
    targets: dict[tuple[object, ...], str] = {}
    for name in sorted(tensors):
        value: Any = tensors[name]
        if torch_tensor is not None and isinstance(value, torch_tensor):
            one = _describe_torch(name, value, targets)
        elif numpy_array is not None and isinstance(value, numpy_array):
            one = _describe_numpy(name, value, targets)
        elif isinstance(value, DeviceTensor):
            raise _OnDevice
        else:
            raise _refusal(name, "type", type(value).__name__, "a torch.Tensor or a numpy.ndarray")
        described.append(one)
    return DescribedTensors(layout_of([one.spec for one in described]), tuple(described), "cpu")


def layout_of(specs: Sequence[TensorSpec]) -> Layout:
    """The layout of tensors, in the order of their names. Loaders describe the same tensors again and again (to acquire
    them, to publish them, for the next weights of a training): an equal layout is the same object as the last time, and
    what was made from it is not made again."""
    global _last_layout
    last = _last_layout
    if last is not None and len(last) == len(specs) and last.tensors == tuple(specs):
        return last
    layout = Layout(specs)
    if len(layout) <= _KEPT_TENSORS:
        _last_layout = layout
    return layout


def _describe_torch(name: str, tensor: torch.Tensor, targets: dict[tuple[object, ...], str]) -> DescribedTensor:
    torch_strided, dtype_names = _torch_names()
    if tensor.device.type != "cpu":
        if tensor.device.type in DEVICE_KINDS:
            raise _OnDevice
        _refuse_torch_device(name, tensor)
    if tensor.layout is not torch_strided:
        raise _refusal(name, "layout", tensor.layout, "torch.strided", "Use .to_dense().")
    dtype = dtype_names.get(tensor.dtype)
    if dtype is None:
        hint = (
            "Share its int_repr() and its scales and zero points as tensors of their own."
            if tensor.is_quantized
            else "Share the memory as integers of whole bytes."
        )
        raise _refusal(name, "dtype", tensor.dtype, "one of " + ", ".join(ITEM_SIZES), hint)
    try:
        lazy = tensor.is_neg() or tensor.is_conj()
        shape, stride, offset = tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())
        available = tensor.untyped_storage().nbytes()
        address = tensor.data_ptr()
    except (RuntimeError, ValueError) as error:  # uninitialised parameters and wrappers without memory say so this way
        raise _refusal(
            name, "memory", "not there", "a tensor with memory of its own", "Materialise it first."
        ) from error
    if lazy:
        raise _refusal(
            name, "memory", "a lazy conjugate or negative", "plain memory", "Use .resolve_conj().resolve_neg()."
        )
    item_size = ITEM_SIZES[dtype]
    count = tensor.numel()
    storage_bytes = count * item_size if tensor.is_contiguous() else _span_bytes(name, shape, stride, count, item_size)
    if storage_bytes and (address == 0 or offset * item_size + storage_bytes > available):
        raise _refusal(
            name,
            "memory",
            f"{available} bytes",
            f"a storage of {storage_bytes} bytes",
            "Its storage was freed or resized.",
        )
    return _described(name, dtype, shape, stride, storage_bytes, offset, address, targets, tensor, "torch")


def _refuse_torch_device(name: str, tensor: torch.Tensor) -> None:
    hint = "Give it memory first, for example with to_empty()." if tensor.device.type == "meta" else "Use .cpu()."
    raise _refusal(name, "device", str(tensor.device), "a device of kind " + " or ".join(DEVICE_KINDS), hint)


@cache
def _torch_names() -> tuple[object, Mapping[object, str]]:
    torch = sys.modules["torch"]
    # Older versions lack some of the types.
    return torch.strided, {getattr(torch, name): name for name in ITEM_SIZES if hasattr(torch, name)}


def _describe_numpy(name: str, array: numpy.ndarray, targets: dict[tuple[object, ...], str]) -> DescribedTensor:
    if hasattr(array, "mask"):
        raise _refusal(
            name, "type", type(array).__name__, "an array without a mask", "Share its data and mask as two arrays."
        )
    dtype, item_size = array.dtype.name, array.dtype.itemsize
    if not array.dtype.isnative:
        raise _refusal(
            name, "dtype", array.dtype.str, "native byte order", "Use array.astype(array.dtype.newbyteorder('='))."
        )
    if array.dtype.names is not None or ITEM_SIZES.get(dtype) != item_size:
        raise _refusal(name, "dtype", array.dtype, "one of " + ", ".join(ITEM_SIZES))
    shape = array.shape
    if any(step % item_size for step in array.strides):
        raise _refusal(
            name, "strides", array.strides, f"multiples of {item_size} bytes", "Use numpy.ascontiguousarray()."
        )
    stride = tuple(step // item_size for step in array.strides)
    if array.flags.c_contiguous:
        storage_bytes = array.nbytes
    else:
        if any(step < 0 for step in stride):
            raise _refusal(name, "strides", array.strides, "strides of 0 or more", "Use numpy.ascontiguousarray().")
        storage_bytes = _span_bytes(name, shape, stride, array.size, item_size)
    address: int = array.__array_interface__["data"][0]
    one = _described(name, dtype, shape, stride, storage_bytes, 0, address, targets, array, "numpy")
    one.read_only = not array.flags.writeable
    return one


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
            raise _refusal(
                name, "stride", stride, "elements that do not overlap", "Use .contiguous() or numpy.array()."
            )
        reach += (size - 1) * step
    return (reach + 1) * item_size


def _refusal(name: str, field: str, value: object, expected: str, hint: str = "") -> InvalidArgument:
    return InvalidArgument(f"tensors[{name}].{field}", value, expected, hint=hint)
