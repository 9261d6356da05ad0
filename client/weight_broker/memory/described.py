"""The caller's tensors as values, independent of framework and kind of memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from weight_broker.errors import InvalidArgument
from weight_broker.kinds import TRAITS
from weight_broker.layout import Layout, TensorSpec

_KEPT_TENSORS = 20_000
"""A layout with more tensors is not kept: the cache takes a few megabytes at most."""
_last_layout: Layout | None = None


@dataclass(slots=True)
class DescribedTensor:
    spec: TensorSpec
    address: int
    """Lowest address of its elements; 0 if it has none."""
    owner: object
    """The tensor itself, which keeps the memory alive."""
    framework: str
    """"torch", "numpy", or "device" for device memory of any framework."""
    read_only: bool = False
    """True if its memory must not be written."""


@dataclass(slots=True)
class DescribedTensors:
    """Keeps the tensors alive."""

    layout: Layout
    tensors: tuple[DescribedTensor, ...]
    """In the layout's order."""
    device_kind: str
    """The kind of memory of all tensors."""

    def require_writable(self) -> None:
        """Raise `InvalidArgument` if one of the tensors cannot be filled."""
        for tensor in self.tensors:
            if tensor.read_only:
                raise refusal(tensor.spec.name, "memory", "read-only", "a writable array", "Use numpy.array(array).")

    def require_host_memory(self) -> None:
        """Raise `InvalidArgument` unless the processor can reach the tensors. Called before
        copies through addresses: a device's addresses mean nothing to the processor, or something else."""
        if TRAITS[self.device_kind].has_devices:
            raise InvalidArgument("tensors.device", self.device_kind, "host memory (cpu)", hint="Use .cpu().")


def layout_of(specs: Sequence[TensorSpec]) -> Layout:
    """The layout of tensors, in the order of their names. Loaders describe the same tensors repeatedly (to acquire, to
    publish, for the next weights of a training): an equal layout is the same object as the last time, with everything
    that it caches."""
    global _last_layout
    last = _last_layout
    if last is not None and len(last) == len(specs) and last.tensors == tuple(specs):
        return last
    layout = Layout(specs)
    if len(layout) <= _KEPT_TENSORS:
        _last_layout = layout
    return layout


def refusal(name: str, field: str, value: object, expected: str, hint: str = "") -> InvalidArgument:
    """The error for a tensor that cannot be shared."""
    return InvalidArgument(f"tensors[{name}].{field}", value, expected, hint=hint)
