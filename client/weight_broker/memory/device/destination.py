"""Tensors in device memory, of whichever kind: shared where they are, filled by the broker, verified here."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from weight_broker.digest import ContentDigests, DigestAlgorithm, DigestCoverage
from weight_broker.errors import (
    AcquireTimeout,
    BrokerError,
    IntegrityError,
    PublishRefused,
    RetractTimeout,
    TransferFailed,
)
from weight_broker.layout import Layout
from weight_broker.memory.device.path import can_stage
from weight_broker.memory.host.copying import DeadlinePassed
from weight_broker.memory.tensors import DescribedTensors

if TYPE_CHECKING:
    from weight_broker.connection.attach import AttachConnection
    from weight_broker.connection.session import Session
    from weight_broker.memory.device.staged import StagedShared
    from weight_broker.v1 import weight_set_pb2 as pb

_MODULES = {"npu": "weight_broker.memory.npu.kind", "cuda": "weight_broker.memory.cuda.kind"}
_NAMED_TENSORS = 16

_logger = logging.getLogger("weight_broker")


class Exported(Protocol):
    """Device memory that the broker can map."""

    regions: tuple[pb.Region, ...]
    placements: tuple[tuple[int, int], ...]

    def close(self) -> None:
        """Ends the export; idempotent. Raises `RetractTimeout` if somebody still has the memory mapped."""


class DeviceKind(Protocol):
    """What each kind of device memory can do (`weight_broker.memory.npu.kind`)."""

    def export(self, described: Any) -> Exported:
        """Waits for the device and exports the memory that the tensors lie in. Raises `PublishRefused`."""

    def digest(self, described: Any, deadline: float | None) -> ContentDigests:
        """Full digests of all tensors, after waiting for the device. Raises `DeadlinePassed`, `BrokerError`."""

    def identity(self, described: Any) -> str:
        """The device's name on the wire, the same in every process of the host."""


def kind_of(described: DescribedTensors) -> DeviceKind:
    """What the tensors' kind of memory can do."""
    return cast(DeviceKind, importlib.import_module(_MODULES[described.device_kind]))


def is_on_device(described: DescribedTensors) -> bool:
    """Whether the tensors are in the memory of a device."""
    return described.device_kind in _MODULES


class DeviceShared:
    """Tensors of this process, shared where they are. It keeps them alive; they must not change while it is open."""

    needs_retraction = True

    def __init__(self, described: DescribedTensors, exported: Exported, digests: tuple[ContentDigests, ...]) -> None:
        self.layout: Layout = described.layout
        self.placements = exported.placements
        self.digests = digests
        self._exported = exported
        self._described: DescribedTensors | None = described

    def regions(self, batch: str) -> list[pb.Region]:
        """The exported memory; the same in every publication of it."""
        return list(self._exported.regions)

    @property
    def is_served(self) -> bool:
        """The broker has the memory mapped."""
        return True

    def stage(self, session: Session) -> pb.StagedMemory | None:
        """The broker maps the memory."""
        return None

    @property
    def described(self) -> DescribedTensors | None:
        """The tensors, until `close`."""
        return self._described

    def hand_over(self, connection: AttachConnection, region: pb.Region, index: int) -> None:
        """The message has all that the broker needs."""

    def take_back(self, connection: AttachConnection, region: pb.Region) -> None:
        """The broker let go of it with the publication."""

    def close(self) -> None:
        """Ends the sharing; idempotent. Raises `RetractTimeout` if somebody still has the memory mapped: call again."""
        self._exported.close()
        self._described = None


def share(described: DescribedTensors, deadline: float, path: str = "auto") -> DeviceShared | StagedShared:
    """Digests the tensors and exports their memory, or has this process copy it where that is not possible or not
    wanted (`path`: `auto`, `direct` or `staged`). Raises `PublishRefused`; nothing is exported then."""
    from weight_broker.memory.device.staged import StagedShared

    kind = kind_of(described)
    try:
        digests = kind.digest(described, deadline)
    except DeadlinePassed as error:
        raise PublishRefused(
            "the deadline passed while the tensors were digested; allow more time for publishing"
        ) from error
    if path == "staged":
        return StagedShared(described, (digests,))
    try:
        return DeviceShared(described, kind.export(described), (digests,))
    except PublishRefused as error:
        if path != "auto" or not can_stage(described.device_kind):
            raise
        _logger.warning("the tensors are shared through a bucket of the broker's: %s", error)
        return StagedShared(described, (digests,))


class DeviceDestination:
    """Tensors of this process that the broker fills where they are."""

    zero_copy = False
    is_filled_here = False
    """Whether this process writes to the tensors, and nobody else."""

    def __init__(self, described: DescribedTensors) -> None:
        self.layout: Layout = described.layout
        self.device_kind = described.device_kind
        self._kind = kind_of(described)
        self._described = described
        self._exported: Exported | None = None
        self._digests: tuple[ContentDigests, ...] = ()

    def open(self) -> tuple[str, Sequence[pb.Region], Sequence[tuple[int, int]]]:
        """The device's identity, and the memory that is to be filled; exports it. Raises `TransferFailed`."""
        if self._exported is None:
            try:
                self._exported = self._kind.export(self._described)
            except PublishRefused as error:
                raise TransferFailed(
                    f"the tensors cannot be filled where they are: {error.message}",
                    metadata={**error.metadata, "path": "staged"},
                ) from error
        return self._kind.identity(self._described), self._exported.regions, self._exported.placements

    def verify(self, offered: Sequence[ContentDigests], deadline: float) -> DigestCoverage:
        """Compares what arrived with what was published; the broker has let go of the memory.
        Raises `IntegrityError`, `TransferFailed`, `AcquireTimeout`."""
        expected = next((one for one in offered if one.algorithm is DigestAlgorithm.MULTILINEAR_64), None)
        if expected is None:
            raise TransferFailed("the source has no digests of device memory", touched=True)
        try:
            found = self._kind.digest(self._described, deadline)
        except DeadlinePassed as error:
            raise AcquireTimeout("the deadline passed while the tensors were being verified", touched=True) from error
        wrong = [
            spec.name
            for spec, mine, theirs in zip(self.layout, found.values, expected.values, strict=True)
            if mine != theirs
        ]
        if wrong:
            names = ", ".join(wrong[:_NAMED_TENSORS])
            raise IntegrityError(
                f"{len(wrong)} tensors arrived with wrong content: {names}", touched=True, metadata={"tensors": names}
            )
        self._digests = (expected,)
        return expected.coverage

    def keep(self) -> DeviceShared | StagedShared:
        """The verified tensors as what can be published; its `close` is the caller's from here on."""
        exported, self._exported = self._exported, None
        if exported is None or not self._digests:
            raise AssertionError("nothing was verified here")
        return DeviceShared(self._described, exported, self._digests)

    def close(self) -> None:
        """Ends the export. Raises a `BrokerError` if somebody may still write to the memory."""
        exported, self._exported = self._exported, None
        if exported is None:
            return
        try:
            exported.close()
        except RetractTimeout as error:
            raise BrokerError(
                f"somebody still has the tensors' memory mapped: {error.message}", touched=True, quiesced=False
            ) from error
