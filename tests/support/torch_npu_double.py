"""Stands in for torch_npu where there is none: tensors that say they are on an NPU, and the few functions that the
device path calls. That those are what torch_npu has is shown by test_torch_npu_names.py."""

from __future__ import annotations

import types
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Device:
    """As torch.device("npu", index), which needs torch_npu to be more than a name."""

    type: str
    index: int | None

    def __str__(self) -> str:
        return self.type if self.index is None else f"{self.type}:{self.index}"


class NpuTensor(torch.Tensor):
    """A tensor that says it is on an NPU; its memory is the processor's."""

    npu_index: int | None = 0
    npu_format: int = 2
    npu_storage_elements: int = 0

    device: Any = property(lambda self: Device("npu", self.npu_index))


def on_npu(tensor: torch.Tensor, *, index: int | None = 0, format_number: int = 2, elements: int = 0) -> NpuTensor:
    """`tensor` as if it were on an NPU; `elements` of storage for a padded format."""
    moved = tensor.as_subclass(NpuTensor)
    moved.npu_index, moved.npu_format, moved.npu_storage_elements = index, format_number, elements
    return moved


@dataclass
class TorchNpu:
    """The functions. `module` goes into sys.modules."""

    snapshot: list[dict[str, Any]] = field(default_factory=list)
    synchronized: list[int] = field(default_factory=list)

    @property
    def module(self) -> types.ModuleType:
        """A module with them."""
        module: Any = types.ModuleType("torch_npu")
        module.get_npu_format = lambda tensor: tensor.npu_format
        module.get_storage_size = lambda tensor: tensor.npu_storage_elements
        module.npu = types.SimpleNamespace(memory_snapshot=lambda: self.snapshot, synchronize=self.synchronized.append)
        made: types.ModuleType = module
        return made
