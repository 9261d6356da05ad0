"""The extents of a tensor: the bytes of its memory that belong to it."""

from __future__ import annotations

from weight_broker.layout import ITEM_SIZES, TensorSpec

MAXIMUM_EXTENTS = 1 << 16
"""The most extents of one tensor. Each is a separate copy, so a tensor with more would be copied for minutes."""

Extent = tuple[int, int]
"""Offset from the tensor's first byte, and size; both in bytes."""


class TooScattered(ValueError):
    """The tensor has too many gaps to be moved where it lies."""


def extents(spec: TensorSpec) -> list[Extent]:
    """The tensor's bytes in ascending order, without the gaps between them, which belong to others. Empty for aliases
    and for tensors without elements. Raises `TooScattered`."""
    if spec.alias_of or not spec.storage_bytes:
        return []
    if spec.is_dense:
        return [(0, spec.storage_bytes)]
    run = ITEM_SIZES[spec.dtype]
    steps: list[tuple[int, int]] = []
    dimensions = sorted(
        (step * ITEM_SIZES[spec.dtype], size) for size, step in zip(spec.shape, spec.stride, strict=True)
    )
    for step, size in dimensions:
        if size == 1:
            continue
        if step == run and not steps:
            run *= size
        else:
            steps.append((step, size))
    number = 1
    for _, size in steps:
        number *= size
    if number > MAXIMUM_EXTENTS:
        raise TooScattered(
            f"tensor {spec.name!r} lies in {number} pieces, more than {MAXIMUM_EXTENTS}. Make it contiguous"
        )
    offsets = [0]
    for step, size in steps:
        offsets = [offset + index * step for index in range(size) for offset in offsets]
    return [(offset, run) for offset in sorted(offsets)]
