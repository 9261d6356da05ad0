"""Describes the caller's tensors in the memory of a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from weight_broker.errors import InvalidArgument
from weight_broker.kinds import TRAITS
from weight_broker.layout import ITEM_SIZES, MemoryFormat, TensorSpec
from weight_broker.memory.described import DescribedTensor, DescribedTensors, layout_of, refusal
from weight_broker.memory.device.tensor import DeviceTensor, Segment, SegmentProvider

if TYPE_CHECKING:
    import torch


class Framework(Protocol):
    """The calls of torch for a kind of device (`weight_broker.memory.npu.torch`)."""

    def from_tensor(self, name: str, tensor: torch.Tensor) -> DeviceTensor:
        """A torch tensor on a device of this kind. Raises `InvalidArgument` that names it."""

    def segments(self, device_index: int) -> list[Segment]:
        """The allocator's segments on a device."""

    def synchronize(self, device_index: int) -> None:
        """Wait for all of torch's work on the device."""


@dataclass(slots=True)
class DescribedDeviceTensors(DescribedTensors):
    """Tensors on one device."""

    device_index: int
    """Index of the device in this process."""
    synchronize: Callable[[], None] | None
    """Submits work that the framework holds back; None without a framework."""
    segments: SegmentProvider | None
    """The framework's segments; None if they are unknown."""


def describe_device(tensors: Mapping[str, object], kind: str, framework: Framework) -> DescribedDeviceTensors:
    """Describe tensors in memory of this kind by name: `DeviceTensor`s, torch tensors, or some of each. Exact aliases
    are found. Raises `InvalidArgument` that names the tensor and says what to do about it.
    """
    described: list[DescribedTensor] = []
    targets: dict[tuple[object, ...], str] = {}
    where, by_torch = kind, False
    named: dict[int, Segment] = {}
    device_index = -1
    for name in sorted(tensors):
        value = tensors[name]
        by_torch = by_torch or not isinstance(value, DeviceTensor)
        tensor = value if isinstance(value, DeviceTensor) else _from_torch(name, value, kind, where, framework)
        own = f"{tensor.device_kind}:{tensor.device_index}"
        if described and own != where.partition(",")[0]:
            raise _other_device(name, own, where)
        if not described:
            device_index, where = tensor.device_index, f"{own}, as {name!r} is"
        if tensor.segment is not None:
            named[tensor.segment.base] = tensor.segment
        described.append(_describe(name, tensor, targets))
    return DescribedDeviceTensors(
        layout_of([tensor.spec for tensor in described]),
        tuple(described),
        kind,
        device_index,
        partial(framework.synchronize, device_index) if by_torch else None,
        partial(_segments, framework if by_torch else None, device_index, list(named.values()))
        if by_torch or named
        else None,
    )


def _segments(framework: Framework | None, device_index: int, named: list[Segment]) -> list[Segment]:
    return [*named, *(framework.segments(device_index) if framework is not None else ())]


def _from_torch(name: str, value: object, kind: str, where: str, framework: Framework) -> DeviceTensor:
    import torch

    if not isinstance(value, torch.Tensor):
        raise refusal(name, "type", type(value).__name__, "a tensor on the device that the others are on", "Move it.")
    found = value.device.type
    if found == kind:
        return framework.from_tensor(name, value)
    if found in TRAITS and TRAITS[found].has_devices:
        raise _other_device(name, str(value.device), where)
    hint = "Move it, or publish it on its own."
    raise refusal(name, "device", str(value.device), f"{kind}, as the others", hint)


def _other_device(name: str, device: str, where: str) -> InvalidArgument:
    hint = "Publish the tensors of each device on their own: a weight set is one rank's."
    return refusal(name, "device", device, where, hint)


def _describe(name: str, tensor: DeviceTensor, targets: dict[tuple[object, ...], str]) -> DescribedTensor:
    if tensor.storage_bytes and tensor.address <= 0:
        raise refusal(name, "address", tensor.address, "a device address", "Give the tensor memory first.")
    if tensor.memory_format is MemoryFormat.STRIDED and not _is_dense(tensor):
        hint = "Use .contiguous(), or share the tensor that it is a part of."
        raise refusal(name, "stride", tensor.stride, "elements without gaps and overlaps", hint)
    alias_of = ""
    if tensor.storage_bytes:
        identity = (tensor.address, tensor.dtype, tensor.shape, tensor.stride, tensor.memory_format)
        target = targets.setdefault(identity, name)
        alias_of = target if target != name else ""
    spec = TensorSpec(
        name,
        tensor.dtype,
        tensor.shape,
        tensor.stride,
        tensor.storage_bytes,
        tensor.storage_offset,
        tensor.memory_format,
        alias_of,
    )
    owner = tensor if tensor.owner is None else tensor.owner
    return DescribedTensor(spec, tensor.address if tensor.storage_bytes else 0, owner, "device")


def _is_dense(tensor: DeviceTensor) -> bool:
    if 0 in tensor.shape:
        return True
    filled = 1
    for step, size in sorted(zip(tensor.stride, tensor.shape, strict=False)):
        if size > 1 and step != filled:
            return False
        filled *= size
    return tensor.storage_bytes == filled * ITEM_SIZES.get(tensor.dtype, 0) or tensor.dtype not in ITEM_SIZES
