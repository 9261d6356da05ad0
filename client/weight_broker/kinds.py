"""Kinds of memory: the vocabulary that client and daemon share.

`TRAITS` has everything that follows from the kind alone. What a kind *does* is in its folder: below
`weight_broker.memory` for the process that has the tensors, below `weight_brokerd.kinds` for the daemon. No other
module compares the name of a kind.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class MemoryKind(enum.StrEnum):
    """The kinds that this version knows."""

    CPU = "cpu"
    NPU = "npu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True)
class Traits:
    """What follows from the kind of memory alone."""

    wire_number: int
    """Value of `DeviceKind` in the proto."""
    broker_copies: bool
    """Whether the broker moves the bytes; if not, the receiver copies or maps them itself."""
    outlives_owner: bool
    """Whether the memory stays readable after its owner has ended."""
    is_copied_to_publish: bool
    """Whether publishing copies the tensors, which may change afterwards."""
    is_packed: bool
    """Whether a region holds only a tensor's elements, without the gaps between them."""
    has_devices: bool
    """Whether the memory belongs to one of several devices, which a device id names."""
    can_be_staged: bool
    """Whether its owner can copy it through a staging buffer of the broker's."""
    handles: tuple[str, ...]
    """Fields of `Region.handle` in the proto that name such memory."""


TRAITS: dict[str, Traits] = {
    MemoryKind.CPU: Traits(
        wire_number=1,
        broker_copies=False,
        outlives_owner=True,
        is_copied_to_publish=True,
        is_packed=True,
        has_devices=False,
        can_be_staged=False,
        handles=("host_memory",),
    ),
    MemoryKind.NPU: Traits(
        wire_number=2,
        broker_copies=True,
        outlives_owner=False,
        is_copied_to_publish=False,
        is_packed=False,
        has_devices=True,
        can_be_staged=True,
        handles=("npu_allocation", "npu_segment"),
    ),
    MemoryKind.CUDA: Traits(
        wire_number=3,
        broker_copies=True,
        outlives_owner=False,
        is_copied_to_publish=False,
        is_packed=False,
        has_devices=True,
        can_be_staged=False,
        handles=("cuda_allocation",),
    ),
}
EMPTY_KIND = MemoryKind.CPU
"""The kind of a weight set that has no content and lies nowhere."""


def kind_of_wire(number: int) -> str | None:
    """The name of a kind by its number on the wire; None if this version does not know it."""
    return next((name for name, traits in TRAITS.items() if traits.wire_number == number), None)
