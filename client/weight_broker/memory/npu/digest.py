"""Digests of an NPU's memory."""

from __future__ import annotations

from weight_broker.digest import ContentDigests
from weight_broker.drivers import acl as acl_module
from weight_broker.drivers.acl import Acl, MemcpyKind
from weight_broker.memory.device.describe import DescribedDeviceTensors
from weight_broker.memory.device.digest import BlockDigester, HostDigester, TorchDigester, tensor_digests


def digest_tensors(
    described: DescribedDeviceTensors,
    *,
    acl: Acl | None = None,
    digester: BlockDigester | None = None,
    deadline: float | None = None,
    sampled: bool = False,
) -> ContentDigests:
    """Full or sampled digests of all tensors, after waiting for the device. `deadline` is a time of `time.monotonic`.

    By torch on the device for torch's tensors; for others the bytes are brought to the processor. Raises `AclError` and
    `DeadlinePassed`.
    """
    acl = acl or acl_module.load()
    if described.synchronize is not None:
        described.synchronize()
    with acl.on_device(described.device_index):
        acl.synchronize_device()
        if digester is None:
            digester = on_device(acl, described) if described.synchronize is not None else _on_host(acl)
        return tensor_digests(described, digester, deadline, sampled=sampled)


def on_device(acl: Acl, described: DescribedDeviceTensors) -> BlockDigester:
    """The digester that computes with torch_npu on the tensors' device."""

    def copy(destination: int, source: int, size: int) -> None:
        acl.memcpy(destination, size, source, size, MemcpyKind.DEVICE_TO_DEVICE)

    assert described.synchronize is not None
    return TorchDigester(f"npu:{described.device_index}", copy, described.synchronize)


def _on_host(acl: Acl) -> BlockDigester:
    def read(host: int, address: int, size: int) -> None:
        acl.memcpy(host, size, address, size, MemcpyKind.DEVICE_TO_HOST)

    return HostDigester(read)
