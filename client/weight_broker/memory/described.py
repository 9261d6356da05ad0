"""What is known of the caller's tensors, whichever framework they come from and whichever memory they lie in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from weight_broker.errors import InvalidArgument
from weight_broker.kinds import TRAITS
from weight_broker.layout import Layout, TensorSpec

_KEPT_TENSORS = 20_000
"""A layout with more tensors is not kept: a few megabytes at most."""
_last_layout: Layout | None = None


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
    """The kind of memory that all of them are in."""

    def require_writable(self) -> None:
        """Raise `InvalidArgument` if one of the tensors cannot be filled."""
        for tensor in self.tensors:
            if tensor.read_only:
                raise refusal(tensor.spec.name, "memory", "read-only", "a writable array", "Use numpy.array(array).")

    def require_host_memory(self) -> None:
        """Raise `InvalidArgument` unless the processor can reach the tensors. What copies through addresses calls it:
        a device's addresses mean nothing to the processor, or something else."""
        if TRAITS[self.device_kind].has_devices:
            raise InvalidArgument("tensors.device", self.device_kind, "host memory (cpu)", hint="Use .cpu().")


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


def refusal(name: str, field: str, value: object, expected: str, hint: str = "") -> InvalidArgument:
    """Why a tensor cannot be shared."""
    return InvalidArgument(f"tensors[{name}].{field}", value, expected, hint=hint)
