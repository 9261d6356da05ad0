"""Sharing tensors where they are, in the memory of an Ascend NPU: what they are (`describe_device`), how the segments
that they lie in get to the broker (`export_segments`), and what their content is (`digest_tensors`).

It works on anything with a device pointer (`DeviceTensor`); torch_npu's tensors are turned into that.
"""

from weight_broker.memory.device_tensor import DeviceTensor, Segment, SegmentKind, SegmentProvider
from weight_broker.memory.npu_describe import DescribedDeviceTensors, describe_device
from weight_broker.memory.npu_digest import digest_tensors
from weight_broker.memory.npu_export import ExportedSegments, device_id, export_segments

__all__ = [
    "DescribedDeviceTensors",
    "DeviceTensor",
    "ExportedSegments",
    "Segment",
    "SegmentKind",
    "SegmentProvider",
    "describe_device",
    "device_id",
    "digest_tensors",
    "export_segments",
]
