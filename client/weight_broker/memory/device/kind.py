"""The common part of the kinds of device memory. A vendor implements the abstract methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from weight_broker.digest import ContentDigests
from weight_broker.errors import PublishRefused
from weight_broker.layout import Layout
from weight_broker.memory.device.access import CopiedTensors, Exported
from weight_broker.memory.device.describe import DescribedDeviceTensors, Framework, describe_device
from weight_broker.memory.device.destination import DeviceDestination
from weight_broker.memory.device.shared import share
from weight_broker.memory.kind import Destination, HostCopies, Prepared, Shared, Terms


class DeviceKind(ABC):
    """A `weight_broker.memory.kind.Kind` and a `weight_broker.memory.device.access.DeviceAccess`."""

    name: str

    @property
    @abstractmethod
    def framework(self) -> Framework:
        """The calls of torch for this kind."""

    @abstractmethod
    def export(self, tensors: DescribedDeviceTensors) -> Exported:
        """Wait for the device and export the memory that the tensors lie in. Raises `PublishRefused`."""

    @abstractmethod
    def identity(self, tensors: DescribedDeviceTensors) -> str:
        """The device's name on the wire, the same in every process of the host."""

    @abstractmethod
    def digests(
        self, tensors: DescribedDeviceTensors, deadline: float | None = None, *, sampled: bool = False
    ) -> ContentDigests:
        """Digests of all tensors, full or sampled. Waits for the device. Raises `DeadlinePassed`, `BrokerError`."""

    @abstractmethod
    def host_copies(self, tensors: DescribedDeviceTensors) -> HostCopies:
        """Copies between the tensors and host memory. Raises `DriverError`."""

    def copied(self, tensors: DescribedDeviceTensors) -> CopiedTensors:
        """The tensors, for staged copies by this process. Raises `PublishRefused`."""
        raise PublishRefused(
            f"{self.name} memory cannot be copied through a staging buffer; use device_path 'direct' or 'auto'"
        )

    def describe(self, tensors: Mapping[str, object]) -> DescribedDeviceTensors:
        """Torch tensors and `DeviceTensor`s."""
        return describe_device(tensors, self.name, self.framework)

    def share(
        self, tensors: DescribedDeviceTensors, terms: Terms, deadline: float, prepared: Prepared | None = None
    ) -> Shared:
        """Shares the tensors in place: they must not change, move or be freed while others may read."""
        return share(tensors, self, terms.staging, deadline)

    def prepared_bytes(self, layout: Layout) -> int:
        """Device memory is not copied for publishing."""
        return 0

    def destination(self, tensors: DescribedDeviceTensors, terms: Terms) -> Destination:
        """Filled by the broker or through its staging buffers."""
        return DeviceDestination(tensors, self, terms.staging)
