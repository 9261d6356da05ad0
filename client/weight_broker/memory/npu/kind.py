"""Sharing tensors where they are, in the memory of an Ascend NPU: what they are (`describe_device`), how the segments
that they lie in get to the broker (`export_segments`), and what their content is (`digest_tensors`).

It works on anything with a device pointer (`DeviceTensor`); torch_npu's tensors are turned into that.
"""

from __future__ import annotations

from weight_broker.digest import ContentDigests
from weight_broker.drivers import acl as acl_module
from weight_broker.drivers.acl import device_id
from weight_broker.errors import PublishRefused
from weight_broker.memory.device.describe import DescribedDeviceTensors, describe_device
from weight_broker.memory.device.tensor import DeviceTensor, Segment, SegmentKind, SegmentProvider
from weight_broker.memory.npu.digest import digest_tensors
from weight_broker.memory.npu.export import ExportedSegments, export_segments

__all__ = [
    "DescribedDeviceTensors",
    "DeviceTensor",
    "ExportedSegments",
    "Segment",
    "SegmentKind",
    "SegmentProvider",
    "describe_device",
    "device_id",
    "digest",
    "digest_tensors",
    "export",
    "export_segments",
    "identity",
]


def export(described: DescribedDeviceTensors) -> ExportedSegments:
    """See `DeviceKind`. Whoever knows a key may map the memory: keys go to the broker and
    its card processes and to nobody else. Those are started when they are needed, so no list of their pids would do."""
    return export_segments(described, any_process=True)


def digest(described: DescribedDeviceTensors, deadline: float | None) -> ContentDigests:
    """See `DeviceKind`."""
    try:
        return digest_tensors(described, deadline=deadline)
    except acl_module.AclError as error:
        raise PublishRefused(f"the driver does not read the tensors: {error}") from error


def identity(described: DescribedDeviceTensors) -> str:
    """See `DeviceKind`."""
    return device_id(acl_module.load(), described.device_index)
