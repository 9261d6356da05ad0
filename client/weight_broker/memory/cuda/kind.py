"""Sharing tensors where they are, in the memory of an NVIDIA GPU: how the allocations that they lie in get to the
broker (`export_allocations`), and what their content is.

It works on anything with a device pointer (`DeviceTensor`); torch's tensors are turned into that.
"""

from __future__ import annotations

from weight_broker.digest import ContentDigests
from weight_broker.drivers import cuda as cuda_module
from weight_broker.drivers.cuda import Cuda, CudaError
from weight_broker.errors import PublishRefused
from weight_broker.memory.cuda import torch as cuda_torch
from weight_broker.memory.cuda.export import ExportedAllocations, export_allocations
from weight_broker.memory.device.describe import DescribedDeviceTensors
from weight_broker.memory.device.digest import Engine, HostEngine, TorchEngine, tensor_digests


def export(described: DescribedDeviceTensors) -> ExportedAllocations:
    """See `DeviceKind`. Whoever knows a handle may open the memory: handles go to the
    broker and its card processes and to nobody else."""
    return export_allocations(described)


def digest(described: DescribedDeviceTensors, deadline: float | None) -> ContentDigests:
    """See `DeviceKind`. By torch on the device for torch's tensors; for others the bytes
    are brought to the processor."""
    try:
        cuda = cuda_module.load()
        if described.synchronize is not None:
            described.synchronize()
        with cuda.on_device(described.device_index):
            cuda.synchronize()
            return tensor_digests(described, _engine(cuda, described), deadline)
    except CudaError as error:
        raise PublishRefused(f"NVIDIA's driver does not read the tensors: {error}") from error


def identity(described: DescribedDeviceTensors) -> str:
    """See `DeviceKind`."""
    return cuda_module.load().device_id(described.device_index)


def _engine(cuda: Cuda, described: DescribedDeviceTensors) -> Engine:
    if described.synchronize is None:
        return HostEngine(cuda.read)
    device = described.device_index

    def copy(destination: int, source: int, size: int) -> None:
        # In torch's own stream: what torch does next comes after it.
        cuda.copy_async(destination, source, size, cuda_torch.current_stream(device))

    return TorchEngine(f"cuda:{device}", copy, described.synchronize)
