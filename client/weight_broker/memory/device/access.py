"""The part that differs between kinds of device memory; `weight_broker.memory.device` has the common part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from weight_broker.connection.stage_server import StagedTensors
from weight_broker.digest import ContentDigests
from weight_broker.memory.device.describe import DescribedDeviceTensors

if TYPE_CHECKING:
    from weight_broker.v1 import weight_set_pb2 as pb


class Exported(Protocol):
    """Device memory that the broker can map."""

    regions: tuple[pb.Region, ...]
    placements: tuple[tuple[int, int], ...]
    """(index of the region, offset in bytes) of each tensor in the layout's order; an alias has its target's."""

    def close(self) -> None:
        """Idempotent. Raises `RetractTimeout` while the memory is still mapped."""


class CopiedTensors(StagedTensors, Protocol):
    """Tensors that this process copies to and from staging buffers."""

    def synchronize(self) -> None:
        """Wait for the caller's work on the tensors. Raises `PublishRefused`."""


class DeviceAccess(Protocol):
    """The calls of one vendor's driver."""

    @property
    def name(self) -> str:
        """The kind's name."""

    def export(self, tensors: DescribedDeviceTensors) -> Exported:
        """Wait for the device and export the memory that the tensors lie in. Raises `PublishRefused`."""

    def identity(self, tensors: DescribedDeviceTensors) -> str:
        """The device's name on the wire, the same in every process of the host."""

    def copied(self, tensors: DescribedDeviceTensors) -> CopiedTensors:
        """The tensors, for staged copies by this process. Raises `PublishRefused`."""

    def digests(
        self, tensors: DescribedDeviceTensors, deadline: float | None = None, *, sampled: bool = False
    ) -> ContentDigests:
        """Digests of all tensors, full or sampled. Waits for the device. Raises `DeadlinePassed`, `BrokerError`."""
