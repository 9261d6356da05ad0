"""What the device path knows of the caller's memory: tensors and segments, by address."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from weight_broker.layout import MemoryFormat


class SegmentKind(enum.StrEnum):
    """How the driver gave a segment."""

    PLAIN = "plain"
    """One allocation (aclrtMalloc, cudaMalloc), shared by its export key or handle."""
    VMM = "vmm"
    """Physical chunks mapped at consecutive addresses (expandable segments), shared chunk by chunk."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of device memory as the driver gave it: what can be shared, of which tensors are parts."""

    base: int
    size: int
    """Bytes."""
    kind: SegmentKind = SegmentKind.PLAIN
    chunk_bytes: int = 0
    """Size of each chunk of a `VMM` segment; 0: the driver is asked."""
    device_index: int | None = None
    """None: the tensors'."""
    sleeps: bool = False
    """True if it is of a pool that takes the memory away while the engine sleeps."""

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.base + self.size


@dataclass(frozen=True, slots=True)
class DeviceTensor:
    """Anything with a device pointer: a tensor of whichever framework, by what the device path needs of it.

    The elements are dense: they fill `storage_bytes` bytes from `address` on without gaps, in any order.
    """

    address: int
    """Device address of its first byte; 0 if it has no elements."""
    dtype: str
    """Element type by its PyTorch name."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """In elements."""
    storage_bytes: int
    """Bytes in its memory format, with that format's padding."""
    device_index: int
    """The device as this process counts, not a physical number."""
    memory_format: MemoryFormat = MemoryFormat.STRIDED
    storage_offset: int = 0
    """In elements; for the layout's information."""
    owner: object = None
    """What keeps the memory alive."""
    segment: Segment | None = None
    """The driver's allocation that it lies in; None if its framework or the driver can tell."""
    device_kind: str = "npu"
    """Or "cuda"."""


SegmentProvider = Callable[[], Sequence[Segment]]
