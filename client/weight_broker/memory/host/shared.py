"""A weight set in sealed host memory, which can be handed to others."""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weight_broker.digest import ContentDigests
from weight_broker.layout import Layout

if TYPE_CHECKING:
    from weight_broker.connection.attach import AttachConnection
    from weight_broker.connection.session import Session
    from weight_broker.v1 import resources_pb2
    from weight_broker.v1 import weight_set_pb2 as pb


@dataclass(slots=True, weakref_slot=True, eq=False)
class SharedWeights:
    """Host memory: sealed memfds and where the tensors lie in them, exported here or granted by a source. Sealed memory
    never changes, so whoever has verified it may publish it again without looking at it."""

    layout: Layout
    memfds: list[tuple[int, int]]
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
        return tuple(descriptor for descriptor, _ in self.memfds)

    @property
    def needs_retraction(self) -> bool:
        """Readers hold the sealed memory by themselves: it is theirs as much as ours."""
        return False

    def regions(self, batch: str) -> list[pb.Region]:
        """The regions as they are published."""
        from weight_broker.v1 import weight_set_pb2 as pb

        return [
            pb.Region(
                region_id=f"{batch}-{index}",
                device_kind=pb.DEVICE_KIND_CPU,
                size_bytes=size_bytes,
                host_memory=pb.HostMemory(),
            )
            for index, (_, size_bytes) in enumerate(self.memfds)
        ]

    @property
    def is_served(self) -> bool:
        """The broker holds the memory itself."""
        return True

    def stage(self, session: Session) -> pb.StagedMemory | None:
        """The broker holds the memory itself."""
        return None

    def note(self, publication: resources_pb2.Publication) -> None:
        """There is one way only."""

    def hand_over(self, connection: AttachConnection, region: pb.Region, index: int) -> None:
        """The memfd goes over the attach socket."""
        connection.offer_region(region.region_id, *self.memfds[index])

    def take_back(self, connection: AttachConnection, region: pb.Region) -> None:
        """The broker closes it if nothing else needs it."""
        connection.withdraw_region(region.region_id)

    def close(self) -> None:
        """Closes the descriptors. Idempotent."""
        while self.memfds:
            descriptor, _ = self.memfds.pop()
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
