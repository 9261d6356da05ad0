"""Describes the caller's tensors: finds their kind of memory, then asks that kind.

PyTorch and NumPy are used only if the caller passes their tensors; this module imports neither.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from weight_broker.errors import InvalidArgument
from weight_broker.kinds import TRAITS, MemoryKind
from weight_broker.memory.described import DescribedTensor, DescribedTensors
from weight_broker.memory.device.tensor import DeviceTensor
from weight_broker.memory.kind import kind_of

__all__ = ["DescribedTensor", "DescribedTensors", "describe"]


def describe(tensors: Mapping[str, object]) -> DescribedTensors:
    """Describe torch tensors, NumPy arrays or device tensors by name. Tensors that are one another's exact aliases
    (same address, type, shape and stride) are found; the first name in sorted order is the one the others point to.

    Raises `InvalidArgument` that names the tensor and says what to do about it.
    """
    if not isinstance(tensors, Mapping):
        raise InvalidArgument("tensors", type(tensors).__name__, "a mapping of names to tensors")
    for name in tensors:
        if not isinstance(name, str):
            raise InvalidArgument("tensors", name, "a mapping whose names are texts")
    described: DescribedTensors = kind_of(_kind_of(tensors)).describe(tensors)
    return described


def _kind_of(tensors: Mapping[str, object]) -> str:
    """The kind of the first tensor that is on a device; without any, all are in the processor's memory."""
    torch_tensor = getattr(sys.modules.get("torch"), "Tensor", ())
    for name in sorted(tensors):
        value: Any = tensors[name]
        if isinstance(value, DeviceTensor):
            return value.device_kind
        if isinstance(value, torch_tensor):
            kind: str = value.device.type
            if kind in TRAITS and TRAITS[kind].has_devices:
                return kind
    return MemoryKind.CPU.value
