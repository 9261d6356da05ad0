"""What all kinds of device memory do alike. A vendor's own part is what is abstract here."""

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
from weight_broker.memory.kind import Destination, Prepared, Shared, Terms


class DeviceKind(ABC):
    """See `weight_broker.memory.kind.Kind`, and `weight_broker.memory.device.access.DeviceAccess` for the rest."""

    name: str

    @property
    @abstractmethod
    def framework(self) -> Framework:
        """What torch knows of such devices."""

    @abstractmethod
    def export(self, tensors: DescribedDeviceTensors) -> Exported:
        """Waits for the device and exports the memory that the tensors lie in. Raises `PublishRefused`."""

    @abstractmethod
    def identity(self, tensors: DescribedDeviceTensors) -> str:
        """The device's name on the wire, the same in every process of the host."""

    @abstractmethod
    def digests(self, tensors: DescribedDeviceTensors, deadline: float | None = None) -> ContentDigests:
        """Full digests of all tensors, after waiting for the device. Raises `DeadlinePassed`, `BrokerError`."""

    def copied(self, tensors: DescribedDeviceTensors) -> CopiedTensors:
        """The tensors as this process copies them. Raises `PublishRefused`."""
        raise PublishRefused(f"{self.name} memory cannot be copied through a staging buffer")

    def describe(self, tensors: Mapping[str, object]) -> DescribedDeviceTensors:
        """Torch tensors and `DeviceTensor`s."""
        return describe_device(tensors, self.name, self.framework)

    def share(
        self, tensors: DescribedDeviceTensors, terms: Terms, deadline: float, prepared: Prepared | None = None
    ) -> Shared:
        """Shares the tensors where they are: they must not change, move or be freed while others may read."""
        return share(tensors, self, terms.staging, deadline)

    def prepared_bytes(self, layout: Layout) -> int:
        """The memory stays the device's."""
        return 0

    def destination(self, tensors: DescribedDeviceTensors, terms: Terms) -> Destination:
        """Filled by the broker or through its staging buffers."""
        return DeviceDestination(tensors, self, terms.staging)
