"""Digests of state that is in no tensor with plain memory: packed parameters, extra state, numbers."""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from weight_broker.errors import InvalidArgument
from weight_broker.integrations.modules.walk import PLAIN, is_array

_SHOWN = 12
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def digest(name: str, value: Any, is_moved: Callable[[torch.Tensor], bool] = lambda tensor: False) -> str:
    """A short digest, equal in every process for equal values. Tensors that move with the weight set do not count.
    Raises `InvalidArgument` that names the state."""
    content = hashlib.sha256()
    try:
        _add(content, value, is_moved)
    except Exception as error:  # any object may be here, and do anything when it is asked for its state
        raise InvalidArgument(
            f"module.{name}", type(value).__name__, f"state that can be compared ({type(error).__name__}: {error})",
            hint="It is in no parameter or buffer; load this module without the broker.",
        ) from error  # fmt: skip
    return content.hexdigest()[:_SHOWN]


def is_empty(value: Any) -> bool:
    """Whether there is no state in it."""
    if isinstance(value, io.BytesIO):
        return not value.getbuffer().nbytes
    if isinstance(value, torch.Tensor):
        return not value.numel()
    return value is None or (isinstance(value, str | bytes | tuple | list | Mapping) and not value)


def _add(content: Any, value: Any, is_moved: Callable[[torch.Tensor], bool]) -> None:
    if isinstance(value, torch.Tensor):
        if not is_moved(value):
            _add_tensor(content, value)
    elif is_array(value):
        content.update(f"{value.dtype}{value.shape}{zlib.crc32(value.tobytes())}".encode())
    elif isinstance(value, PLAIN):
        content.update(repr(value).encode("utf-8", "surrogatepass") + b";")
    elif isinstance(value, bytes | bytearray):
        content.update(b"bytes" + value)
    elif isinstance(value, io.BytesIO):
        content.update(b"bytes" + value.getvalue())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            content.update(f"{key}:".encode())
            _add(content, item, is_moved)
    elif isinstance(value, list | tuple):
        content.update(f"[{len(value)}".encode())
        for item in value:
            _add(content, item, is_moved)
    elif isinstance(value, torch.ScriptObject):
        _add(content, value.__getstate__(), is_moved)
    else:
        content.update(_ADDRESS.sub("", repr(value)).encode() if _is_shown_whole(value) else pickle.dumps(value))


def _is_shown_whole(value: Any) -> bool:
    """Whether the text of an object says all of it: types, enumerations, values of dataclasses, torch's own objects."""
    is_value = isinstance(value, type) or hasattr(value, "__dataclass_fields__") or hasattr(type(value), "__members__")
    return is_value or type(value).__module__.startswith("torch.")


def _add_tensor(content: Any, tensor: torch.Tensor) -> None:
    tensor = tensor.detach()
    content.update(f"{tensor.dtype}{tuple(tensor.shape)}{tensor.layout}".encode())
    if tensor.is_meta:
        return
    if tensor.is_quantized:
        _add(content, _quantization(tensor), lambda _: False)
        tensor = tensor.int_repr()
    elif tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    flat = tensor.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8)
    content.update(str(zlib.crc32(flat.numpy().data)).encode())


def _quantization(tensor: torch.Tensor) -> tuple[Any, ...]:
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return tensor.q_scale(), tensor.q_zero_point()
    return tensor.q_per_channel_axis(), tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
