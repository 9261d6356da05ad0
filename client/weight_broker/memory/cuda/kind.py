"""The memory of an NVIDIA GPU as a kind. It works on `DeviceTensor`s; torch's tensors are converted."""

from __future__ import annotations

from functools import partial

from weight_broker.digest import ContentDigests
from weight_broker.drivers import cuda as cuda_module
from weight_broker.drivers.cuda import Cuda, CudaError
from weight_broker.errors import PublishRefused
from weight_broker.kinds import MemoryKind
from weight_broker.memory.cuda import torch as cuda_torch
from weight_broker.memory.cuda.export import ExportedAllocations, export_allocations
from weight_broker.memory.device.describe import DescribedDeviceTensors, Framework
from weight_broker.memory.device.digest import BlockDigester, HostDigester, TorchDigester, tensor_digests
from weight_broker.memory.device.host_copies import DriverCopies
from weight_broker.memory.device.kind import DeviceKind
from weight_broker.memory.kind import HostCopies


class CudaKind(DeviceKind):
    name = MemoryKind.CUDA.value

    @property
    def framework(self) -> Framework:
        return cuda_torch

    def export(self, tensors: DescribedDeviceTensors) -> ExportedAllocations:
        """Handles are secrets: they are enough to open the memory. Only the broker and its card processes get them."""
        return export_allocations(tensors)

    def identity(self, tensors: DescribedDeviceTensors) -> str:
        """The GPU's UUID."""
        return cuda_module.load().device_id(tensors.device_index)

    def host_copies(self, tensors: DescribedDeviceTensors) -> HostCopies:
        """By the driver, from and to pageable memory."""
        cuda = cuda_module.load()

        def synchronize() -> None:
            if tensors.synchronize is not None:
                tensors.synchronize()
            cuda.synchronize()

        return DriverCopies(partial(cuda.on_device, tensors.device_index), synchronize, cuda.read, cuda.write)

    def digests(
        self, tensors: DescribedDeviceTensors, deadline: float | None = None, *, sampled: bool = False
    ) -> ContentDigests:
        """torch computes on the device for its own tensors; other tensors are read into host memory."""
        try:
            cuda = cuda_module.load()
            if tensors.synchronize is not None:
                tensors.synchronize()
            with cuda.on_device(tensors.device_index):
                cuda.synchronize()
                return tensor_digests(tensors, _digester(cuda, tensors), deadline, sampled=sampled)
        except CudaError as error:
            raise PublishRefused(f"NVIDIA's driver does not read the tensors: {error}") from error


def _digester(cuda: Cuda, tensors: DescribedDeviceTensors) -> BlockDigester:
    if tensors.synchronize is None:
        return HostDigester(cuda.read)
    device = tensors.device_index

    def copy(destination: int, source: int, size: int) -> None:
        # In torch's own stream: what torch does next comes after it.
        cuda.copy_async(destination, source, size, cuda_torch.current_stream(device))

    return TorchDigester(f"cuda:{device}", copy, tensors.synchronize)


KIND = CudaKind()
