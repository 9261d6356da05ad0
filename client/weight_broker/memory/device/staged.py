"""Device memory that the broker does not map: this process copies it, through buckets of the broker's."""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from weight_broker.connection.stage_server import StagedTensors, StageServer
from weight_broker.digest import ContentDigests
from weight_broker.errors import PublishRefused, TransferFailed
from weight_broker.layout import Layout
from weight_broker.memory.device.destination import DeviceDestination, DeviceShared, kind_of
from weight_broker.memory.device.path import can_stage
from weight_broker.memory.tensors import DescribedTensors

if TYPE_CHECKING:
    from weight_broker.connection.attach import AttachConnection
    from weight_broker.connection.session import Session
    from weight_broker.v1 import weight_set_pb2 as pb

_MODULES = {"npu": ("weight_broker.memory.npu.stage", "NpuStagedTensors")}


class _Tensors(StagedTensors, Protocol):
    def synchronize(self) -> None:
        """Waits for whatever the caller does with the tensors."""


def _staged_tensors(described: DescribedTensors) -> _Tensors:
    if not can_stage(described.device_kind):
        raise PublishRefused(f"{described.device_kind} memory cannot be copied through a bucket")
    module, name = _MODULES[described.device_kind]
    kind: Any = getattr(importlib.import_module(module), name)
    return cast(_Tensors, kind(described))


class StagedShared:
    """Tensors of this process that it copies for others. It keeps them alive; they must not change while it is open."""

    needs_retraction = True
    placements: Sequence[tuple[int, int]] = ()

    def __init__(
        self,
        described: DescribedTensors,
        digests: tuple[ContentDigests, ...],
        tensors: StagedTensors | None = None,
        stage_id: str = "",
        server: StageServer | None = None,
    ) -> None:
        """Raises `PublishRefused`. The other arguments are of tensors that are served already."""
        self.layout: Layout = described.layout
        self.digests = digests
        self._device_kind = described.device_kind
        self._device_id = kind_of(described).identity(described)
        self._tensors: StagedTensors | None = tensors if tensors is not None else _staged_tensors(described)
        self._stage_id = stage_id or uuid.uuid4().hex
        self._server = server

    @property
    def is_served(self) -> bool:
        """Whether the broker can ask for them."""
        return self._server is not None and self._server.serves(self._stage_id)

    def regions(self, batch: str) -> list[pb.Region]:
        """None."""
        return []

    def stage(self, session: Session) -> pb.StagedMemory:
        """Serves them in this session."""
        from weight_broker.v1 import weight_set_pb2 as pb
        from weight_broker.wire import DEVICE_KINDS

        if self._tensors is None:
            raise AssertionError("what is closed is not published")
        if self._server is not None and self._server is not session.stage:
            self._server.remove(self._stage_id)
        self._server = session.stage
        self._server.add(self._stage_id, self._tensors)
        return pb.StagedMemory(
            stage_id=self._stage_id, device_kind=DEVICE_KINDS[self._device_kind], device_id=self._device_id
        )

    def hand_over(self, connection: AttachConnection, region: pb.Region, index: int) -> None:
        """There are no regions."""

    def take_back(self, connection: AttachConnection, region: pb.Region) -> None:
        """There are no regions."""

    def close(self) -> None:
        """Returns when nobody reads them any more. Idempotent."""
        server, self._server = self._server, None
        if server is not None:
            server.remove(self._stage_id)
        self._tensors = None


class StagedDestination(DeviceDestination):
    """Tensors of this process that it fills itself, from a bucket that the broker fills."""

    is_filled_here = True

    def __init__(self, described: DescribedTensors) -> None:
        super().__init__(described)
        self._stage_id = uuid.uuid4().hex
        self._tensors: _Tensors | None = None
        self._server: StageServer | None = None

    def open(self) -> tuple[str, Sequence[pb.Region], Sequence[tuple[int, int]]]:
        """The device's identity, and no regions. Raises `TransferFailed`."""
        try:
            if self._tensors is None:
                self._tensors = _staged_tensors(self._described)
            self._tensors.synchronize()
        except PublishRefused as error:
            raise TransferFailed(f"the tensors cannot be filled through a bucket: {error.message}") from error
        return self._kind.identity(self._described), (), ()

    def serve(self, session: Session) -> str:
        """Lets the broker fill them in this session, after `open`; their name there."""
        if self._tensors is None:
            raise AssertionError("serve comes after open")
        if self._server is not None and self._server is not session.stage:
            self._server.remove(self._stage_id)
        self._server = session.stage
        self._server.add(self._stage_id, self._tensors)
        return self._stage_id

    def keep(self) -> DeviceShared | StagedShared:
        """The verified tensors as what can be published; its `close` is the caller's from here on."""
        server, self._server = self._server, None
        if server is None or not self._digests:
            raise AssertionError("nothing was verified here")
        return StagedShared(self._described, self._digests, self._tensors, self._stage_id, server)

    def close(self) -> None:
        """Returns when nobody writes to the tensors any more: nobody but this process does."""
        server, self._server = self._server, None
        if server is not None:
            server.remove(self._stage_id)
