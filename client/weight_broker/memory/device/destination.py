"""Tensors in device memory that an acquisition fills: in place by the broker, or by this process from staging
buffers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from weight_broker.connection.deadline import seconds_until
from weight_broker.digest import ContentDigests, DigestAlgorithm
from weight_broker.errors import (
    AcquireTimeout,
    BrokerError,
    IntegrityError,
    PublishRefused,
    RetractTimeout,
    TransferFailed,
)
from weight_broker.layout import Layout
from weight_broker.memory.device.access import DeviceAccess, Exported
from weight_broker.memory.device.describe import DescribedDeviceTensors
from weight_broker.memory.device.offer import Offer
from weight_broker.memory.device.shared import DeviceShared
from weight_broker.memory.kind import ClaimRegion, DeadlinePassed, Received
from weight_broker.memory.policy import StagingPolicy

if TYPE_CHECKING:
    from weight_broker.connection.session import Session
    from weight_broker.v1 import weight_broker_service_pb2 as pb

_NAMED_TENSORS = 16
_GRACE_SECONDS = 35.0


class DeviceDestination:
    """A `weight_broker.memory.kind.Destination`."""

    grace_seconds = _GRACE_SECONDS

    def __init__(self, tensors: DescribedDeviceTensors, access: DeviceAccess, policy: StagingPolicy) -> None:
        self.layout: Layout = tensors.layout
        self._tensors = tensors
        self._access = access
        self._policy = policy
        self._offer = Offer(tensors, access, policy)
        self._is_staged = False
        """Whether the last granted source comes through staging buffers."""
        self._digests: tuple[ContentDigests, ...] = ()

    def fill_request(self, request: pb.AcquireRequest, session: Session, deadline: float) -> None:
        """Add the ways to the memory that the policy allows."""
        from weight_broker.v1 import resources_pb2
        from weight_broker.wire import device_kind_to_wire, placements_to_wire

        offer = self._offer
        try:
            offer.open()
            if not offer.is_exported:  # an export has waited for the device
                offer.wait_for_device()
        except PublishRefused as error:
            raise self._refusal(error) from error
        request.device_kind, request.device_id = device_kind_to_wire(self._access.name), offer.device_id
        request.regions.extend(offer.regions)
        request.placements.extend(placements_to_wire(offer.placements))
        copied, staged = resources_pb2.TRANSFER_PATH_COPY, resources_pb2.TRANSFER_PATH_STAGED
        request.path = copied if offer.is_exported else staged
        if offer.is_staged:
            request.stage_id = offer.serve(session, seconds_until(deadline))

    def take(self, granted: pb.Granted, claim: ClaimRegion, deadline: float) -> Received | None:
        """The broker brings the bytes."""
        from weight_broker.v1 import resources_pb2

        self._is_staged = granted.path == resources_pb2.TRANSFER_PATH_STAGED
        return None

    def verify(self, granted: pb.Granted, moved: pb.Moved, deadline: float) -> Received:
        """The broker has finished with the memory."""
        from weight_broker.wire import digests_from_wire

        begun = time.monotonic()
        published = _comparable(digests_from_wire(granted.digests, len(self.layout), pass_over_unknown=True))
        _compare(self.layout, self._found(deadline), published)
        self._digests = (published,)
        return Received(moved.size_bytes, published.coverage, self.layout, {"verify": time.monotonic() - begun})

    def _found(self, deadline: float) -> ContentDigests:
        try:
            return self._access.digests(self._tensors, deadline)
        except DeadlinePassed as error:
            raise AcquireTimeout("the deadline passed while the tensors were being verified", touched=True) from error
        except BrokerError:
            raise
        except Exception as error:  # the caller must learn that the tensors were written
            raise BrokerError(f"the tensors cannot be verified: {error}", touched=True) from error

    def stop(self) -> bool:
        """End this process's copies. The broker grants a staged transfer only while it writes to nothing itself."""
        self._offer.stop_serving()
        return self._is_staged or not self._offer.is_exported

    def keep(self) -> DeviceShared:
        """The verified tensors, reachable in the same ways."""
        if not self._digests:
            raise AssertionError("nothing was verified here")
        offer, self._offer = self._offer, Offer(self._tensors, self._access, self._policy)
        return DeviceShared(offer, self._access.name, self._digests)

    def close(self) -> None:
        """End this process's copies, then the export."""
        try:
            self._offer.close()
        except RetractTimeout as error:
            raise BrokerError(
                f"the tensors' memory is still mapped; discard their storages: {error.message}",
                touched=True,
                quiesced=False,
            ) from error

    def abandon(self) -> Exported | None:
        """End this process's copies, and leave the export."""
        return self._offer.abandon()

    def _refusal(self, error: PublishRefused) -> TransferFailed:
        direct = self._policy.allows_direct
        what = "the tensors cannot be filled where they are" if direct else "a staged transfer is not possible"
        return TransferFailed(f"{what}: {error.message}", metadata=error.metadata)


def _comparable(offered: Sequence[ContentDigests]) -> ContentDigests:
    for digests in offered:
        if digests.algorithm is DigestAlgorithm.MULTILINEAR_64:
            return digests
    raise TransferFailed("the source has no digests of device memory", touched=True)


def _compare(layout: Layout, found: ContentDigests, published: ContentDigests) -> None:
    wrong = [spec.name for spec, own, other in zip(layout, found.values, published.values, strict=True) if own != other]
    if wrong:
        names = ", ".join(wrong[:_NAMED_TENSORS])
        raise IntegrityError(
            f"{len(wrong)} tensors arrived with wrong content: {names}", touched=True, metadata={"tensors": names}
        )
