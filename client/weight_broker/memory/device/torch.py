"""Checks torch tensors on any kind of device."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from weight_broker.errors import InvalidArgument
from weight_broker.layout import ITEM_SIZES

if TYPE_CHECKING:
    import torch


class PlainTensor(NamedTuple):
    """A torch tensor with allocated, plain memory."""

    dtype: str
    offset: int
    """In elements, from the beginning of its storage."""
    available: int
    """Bytes of its storage."""
    address: int
    item_size: int

    def require(self, name: str, storage_bytes: int) -> None:
        """Raise `InvalidArgument` unless the storage has `storage_bytes` bytes from the offset on."""
        if self.offset * self.item_size + storage_bytes > self.available:
            hint = "Its storage was freed or resized."
            raise _refusal(name, "memory", f"{self.available} bytes", f"a storage of {storage_bytes} bytes", hint)


def plain_tensor(name: str, tensor: torch.Tensor) -> PlainTensor:
    """Raises `InvalidArgument` that names the tensor."""
    import torch

    if tensor.layout is not torch.strided:
        raise _refusal(name, "layout", tensor.layout, "torch.strided", "Use .to_dense().")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in ITEM_SIZES:
        raise _refusal(name, "dtype", tensor.dtype, "one of " + ", ".join(ITEM_SIZES), "Share the integers and scales.")
    if tensor.is_neg() or tensor.is_conj():
        hint = "Use .resolve_conj().resolve_neg()."
        raise _refusal(name, "memory", "a lazy conjugate or negative", "plain memory", hint)
    try:
        available = tensor.untyped_storage().nbytes()
        offset, address = int(tensor.storage_offset()), tensor.data_ptr()
    except (RuntimeError, ValueError) as error:  # uninitialised parameters and wrappers without memory say so this way
        hint = "Materialise it first."
        raise _refusal(name, "memory", "not there", "a tensor with memory", hint) from error
    return PlainTensor(dtype, offset, available, address, tensor.element_size())


def _refusal(name: str, field: str, value: object, expected: str, hint: str) -> InvalidArgument:
    return InvalidArgument(f"tensors[{name}].{field}", value, expected, hint=hint)
