"""A weight set in memory that can be handed to others: what was exported here or granted by a source."""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass

from weight_broker.digest import ContentDigests
from weight_broker.layout import Layout


@dataclass(slots=True, weakref_slot=True, eq=False)
class SharedWeights:
    """Sealed memfds and where the tensors lie in them. Sealed memory never changes, so whoever has verified it may
    publish it again without looking at it."""

    layout: Layout
    regions: list[tuple[int, int]]
    """(descriptor, size in bytes) of each region; owned by this object."""
    placements: tuple[tuple[int, int], ...]
    """(region index, offset in bytes) of each tensor, in the layout's order."""
    digests: tuple[ContentDigests, ...]
    """Digests of the content, best coverage first."""

    def __post_init__(self) -> None:
        _open_weights.add(self)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """The regions' descriptors."""
        return tuple(descriptor for descriptor, _ in self.regions)

    def close(self) -> None:
        """Closes the descriptors. Idempotent."""
        while self.regions:
            descriptor, _ = self.regions.pop()
            os.close(descriptor)

    def __del__(self) -> None:
        # Whoever was to close them was interrupted (a second Ctrl-C): the memory must not stay for ever.
        self.close()


_open_weights: weakref.WeakSet[SharedWeights] = weakref.WeakSet()


def _close_inherited() -> None:
    """A forked child has a copy of every descriptor, which would keep the memory for as long as the child lives."""
    for weights in list(_open_weights):
        weights.close()


os.register_at_fork(after_in_child=_close_inherited)
