"""The memory of an Ascend NPU as a kind. It works on anything with a device pointer (`DeviceTensor`); torch_npu's
tensors are turned into that."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from weight_broker.digest import ContentDigests
from weight_broker.drivers import acl as acl_module
from weight_broker.drivers.acl import AclError, MemcpyKind, device_id
from weight_broker.errors import PublishRefused
from weight_broker.kinds import MemoryKind
from weight_broker.memory.device.access import CopiedTensors
from weight_broker.memory.device.describe import DescribedDeviceTensors, Framework
from weight_broker.memory.device.host_copies import DriverCopies
from weight_broker.memory.device.kind import DeviceKind
from weight_broker.memory.device.tensor import DeviceTensor, Segment, SegmentKind, SegmentProvider
from weight_broker.memory.kind import HostCopies
from weight_broker.memory.npu import torch as npu_torch
from weight_broker.memory.npu.digest import digest_tensors
from weight_broker.memory.npu.export import ExportedSegments, export_segments
from weight_broker.memory.npu.stage import NpuStagedTensors

__all__ = [
    "KIND",
    "DescribedDeviceTensors",
    "DeviceTensor",
    "ExportedSegments",
    "NpuKind",
    "Segment",
    "SegmentKind",
    "SegmentProvider",
    "describe_device",
    "device_id",
    "digest_tensors",
    "export_segments",
]


class NpuKind(DeviceKind):
    """See `DeviceKind`."""

    name = MemoryKind.NPU.value

    @property
    def framework(self) -> Framework:
        """torch_npu."""
        return npu_torch

    def export(self, tensors: DescribedDeviceTensors) -> ExportedSegments:
        """A key is all that is needed to map the memory: keys go to the broker and its card processes only. Those are
        started when they are needed, so no list of their pids would do."""
        return export_segments(tensors, any_process=True)

    def identity(self, tensors: DescribedDeviceTensors) -> str:
        """The physical card."""
        return device_id(acl_module.load(), tensors.device_index)

    def digests(
        self, tensors: DescribedDeviceTensors, deadline: float | None = None, *, sampled: bool = False
    ) -> ContentDigests:
        """By torch_npu on the device for its own tensors; the bytes of others are brought to the processor."""
        try:
            return digest_tensors(tensors, deadline=deadline, sampled=sampled)
        except AclError as error:
            raise PublishRefused(f"the driver does not read the tensors: {error}") from error

    def host_copies(self, tensors: DescribedDeviceTensors) -> HostCopies:
        """By the runtime, from and to pageable memory."""
        acl = acl_module.load()

        def synchronize() -> None:
            if tensors.synchronize is not None:
                tensors.synchronize()
            acl.synchronize_device()

        return DriverCopies(
            partial(acl.on_device, tensors.device_index),
            synchronize,
            lambda host, device, size: acl.memcpy(host, size, device, size, MemcpyKind.DEVICE_TO_HOST),
            lambda device, host, size: acl.memcpy(device, size, host, size, MemcpyKind.HOST_TO_DEVICE),
        )

    def copied(self, tensors: DescribedDeviceTensors) -> CopiedTensors:
        """Copies within the card."""
        return NpuStagedTensors(tensors)


def describe_device(tensors: Mapping[str, object]) -> DescribedDeviceTensors:
    """Describe tensors that are on an NPU."""
    return KIND.describe(tensors)


KIND = NpuKind()
