"""Tensors in device memory that others read: in place, or through staging buffers of the broker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weight_broker.digest import ContentDigests
from weight_broker.errors import PublishRefused
from weight_broker.layout import Layout
from weight_broker.memory.device.access import DeviceAccess
from weight_broker.memory.device.describe import DescribedDeviceTensors
from weight_broker.memory.device.offer import Offer
from weight_broker.memory.kind import DeadlinePassed
from weight_broker.memory.policy import StagingPolicy

if TYPE_CHECKING:
    from weight_broker.connection.attach import AttachConnection
    from weight_broker.connection.session import Session
    from weight_broker.v1 import resources_pb2
    from weight_broker.v1 import weight_set_pb2 as pb


class DeviceShared:
    """The tensors must not change before `close` has returned."""

    needs_retraction = True

    def __init__(self, offer: Offer, kind: str, digests: tuple[ContentDigests, ...]) -> None:
        self.layout: Layout = offer.tensors.layout
        self.digests = digests
        self._kind = kind
        self._offer = offer
        self._is_staged = not offer.is_exported
        """Whether the broker asks this process to copy."""

    @property
    def placements(self) -> tuple[tuple[int, int], ...]:
        """(region index, offset in bytes) of each tensor in the exported memory."""
        return self._offer.placements

    def regions(self, batch: str) -> list[pb.Region]:
        """The exported memory; the same in every publication of it."""
        return list(self._offer.regions)

    @property
    def is_served(self) -> bool:
        """Whether the broker has the memory mapped or, if it picked staging, can ask this process to copy."""
        return self._offer.is_served or not self._is_staged

    def stage(self, session: Session, timeout: float) -> pb.StagedMemory | None:
        """The broker may ask for copies in this session. None if this process makes none."""
        from weight_broker.v1 import weight_set_pb2 as pb
        from weight_broker.wire import device_kind_to_wire

        if not self._offer.is_staged:
            return None
        return pb.StagedMemory(
            stage_id=self._offer.serve(session, timeout),
            device_kind=device_kind_to_wire(self._kind),
            device_id=self._offer.device_id,
        )

    def note(self, publication: resources_pb2.Publication) -> None:
        """The broker picked one of the ways. Both stay open: it may still have the other in use."""
        self._is_staged = publication.is_staged or not self._offer.is_exported

    def hand_over(self, connection: AttachConnection, region: pb.Region, index: int, timeout: float) -> None:
        """Nothing to do: the message names the memory."""

    def take_back(self, connection: AttachConnection, region: pb.Region, timeout: float) -> None:
        """Nothing to do: the broker unmaps the memory when the publication ends."""

    def close(self) -> None:
        """Returns when nothing reads the tensors. Raises `RetractTimeout` while they are still mapped: call again."""
        self._offer.close()


def share(
    tensors: DescribedDeviceTensors, access: DeviceAccess, policy: StagingPolicy, deadline: float
) -> DeviceShared:
    """Digest the tensors and open the ways to read them. Raises `PublishRefused`; nothing is exported then."""
    try:
        digests = access.digests(tensors, deadline)
    except DeadlinePassed as error:
        raise PublishRefused(
            "the deadline passed while the tensors were digested; allow more time for publishing"
        ) from error
    offer = Offer(tensors, access, policy)
    offer.open()
    return DeviceShared(offer, access.name, (digests,))
