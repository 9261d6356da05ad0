"""Tensors on a GPU: what they are, and which allocations are shared. NVIDIA's driver is replaced by an object that
knows allocations; real calls are made in tests/integration/cuda (on a double of the library) and tests/gpu."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch

from weight_broker.drivers.cuda import HANDLE_BYTES, Cuda, CudaError
from weight_broker.errors import InvalidArgument, PublishRefused
from weight_broker.memory import describe
from weight_broker.memory.cuda.export import ExportedAllocations, export_allocations
from weight_broker.memory.device.describe import DescribedDeviceTensors
from weight_broker.memory.device.tensor import DeviceTensor
from weight_broker.v1 import weight_set_pb2 as pb

MIB = 1 << 20
UUID = "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"


class GpuTensor(torch.Tensor):
    """A tensor that says it is on a GPU; its memory is the processor's."""

    device: Any = property(lambda self: torch.device("cuda", 1))


class Driver:
    """Knows allocations: base, size, whether it has a handle."""

    def __init__(self, *allocations: tuple[int, int, bool]) -> None:
        self._allocations = allocations
        self.calls: list[str] = []

    @contextmanager
    def on_device(self, device: int) -> Iterator[None]:
        self.calls.append(f"on {device}")
        yield

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def device_id(self, _device: int) -> str:
        return UUID

    def allocation_of(self, address: int) -> tuple[int, int]:
        return self._find(address)[:2]

    def is_ipc_capable(self, address: int) -> bool:
        return self._find(address)[2]

    def ipc_handle(self, base: int) -> bytes:
        self.calls.append(f"handle of {base:#x}")
        return base.to_bytes(HANDLE_BYTES, "big")

    def _find(self, address: int) -> tuple[int, int, bool]:
        for base, size, capable in self._allocations:
            if base <= address < base + size:
                return base, size, capable
        raise CudaError("cuMemGetAddressRange_v2", 1, "CUDA_ERROR_INVALID_VALUE")


def tensor(address: int, size: int = 64, device: int = 1) -> DeviceTensor:
    return DeviceTensor(address if size else 0, "int8", (size,), (1,), size, device, device_kind="cuda")


def described(**tensors: object) -> DescribedDeviceTensors:
    found = describe(tensors)
    assert isinstance(found, DescribedDeviceTensors)
    return found


def export(driver: Driver, found: DescribedDeviceTensors) -> ExportedAllocations:
    return export_allocations(found, cuda=cast("Cuda", driver))


@pytest.fixture
def snapshot(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """What torch says of its segments."""
    rows: list[dict[str, object]] = []
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: rows)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)
    return rows


def test_a_torch_tensor_on_a_gpu_is_described_by_its_pointer() -> None:
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    found = described(w=base.as_subclass(GpuTensor), v=base[1:].as_subclass(GpuTensor))
    assert (found.device_kind, found.device_index) == ("cuda", 1)
    by_name = {one.spec.name: one for one in found.tensors}
    assert by_name["w"].address == base.data_ptr()
    assert by_name["v"].address == base.data_ptr() + 16
    assert (by_name["v"].spec.shape, by_name["v"].spec.storage_bytes, by_name["v"].spec.storage_offset) == (
        (2, 4),
        32,
        4,
    )


def test_tensors_with_gaps_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="without gaps"):
        describe({"w": torch.zeros(4, 4)[:, :2].as_subclass(GpuTensor)})


@pytest.mark.parametrize("other", [tensor(0x1000, device=0), DeviceTensor(0x1000, "int8", (64,), (1,), 64, 1)])
def test_tensors_of_two_devices_or_kinds_are_no_weight_set(other: DeviceTensor) -> None:
    with pytest.raises(InvalidArgument, match="Publish the tensors of each device on their own"):
        describe({"a": tensor(0x1000), "b": other})


def test_each_allocation_is_shared_once_and_as_a_whole() -> None:
    driver = Driver((2 * MIB, 2 * MIB, True), (8 * MIB, 4 * MIB, True))
    found = described(
        a=tensor(9 * MIB), b=tensor(2 * MIB + 512), c=tensor(8 * MIB), d=tensor(0, 0), tied=tensor(2 * MIB + 512)
    )
    exported = export(driver, found)
    assert [(one.size_bytes, one.device_id, one.device_kind) for one in exported.regions] == [
        (4 * MIB, UUID, pb.DEVICE_KIND_CUDA),
        (2 * MIB, UUID, pb.DEVICE_KIND_CUDA),
    ]
    assert [int.from_bytes(one.cuda_allocation.ipc_handle, "big") for one in exported.regions] == [8 * MIB, 2 * MIB]
    assert exported.placements == ((0, MIB), (1, 512), (0, 0), (0, 0), (1, 512))
    assert driver.calls.index("synchronize") < driver.calls.index(f"handle of {8 * MIB:#x}")


def test_the_same_memory_has_the_same_id_and_no_other_memory_has() -> None:
    first, second = (2 * MIB, 2 * MIB, True), (8 * MIB, 2 * MIB, True)
    (one,) = export(Driver(first), described(a=tensor(2 * MIB))).regions
    (again,) = export(Driver(first), described(b=tensor(3 * MIB))).regions
    (other,) = export(Driver(second), described(a=tensor(8 * MIB))).regions
    assert one.region_id == again.region_id != other.region_id


def test_an_expandable_segment_is_refused_by_its_name(snapshot: list[dict[str, object]]) -> None:
    memory = torch.zeros(64, dtype=torch.int8).as_subclass(GpuTensor)
    snapshot.append({"device": 1, "address": memory.data_ptr(), "total_size": 64, "is_expandable": True})
    with pytest.raises(PublishRefused) as refused:
        export(Driver((memory.data_ptr(), 64, False)), described(w=memory))
    assert "'w'" in refused.value.message
    assert "is in an expandable segment" in refused.value.message
    assert "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False" in refused.value.message


def test_other_memory_without_a_handle_is_refused_with_what_it_may_be(snapshot: list[dict[str, object]]) -> None:
    memory = torch.zeros(64, dtype=torch.int8).as_subclass(GpuTensor)
    snapshot.append({"device": 1, "address": memory.data_ptr(), "total_size": 64, "is_expandable": False})
    with pytest.raises(PublishRefused, match=r"cudaMallocAsync.*backend:native.*without sleep mode"):
        export(Driver((memory.data_ptr(), 64, False)), described(w=memory))


def test_what_the_driver_does_not_know_is_refused_in_its_words() -> None:
    with pytest.raises(PublishRefused, match="CUDA_ERROR_INVALID_VALUE") as refused:
        export(Driver(), described(w=tensor(0x1000)))
    assert refused.value.metadata["call"] == "cuMemGetAddressRange_v2"


def test_a_tensor_that_is_longer_than_its_allocation_is_refused() -> None:
    with pytest.raises(PublishRefused, match="behind its allocation"):
        export(Driver((0x1000, 32, True)), described(w=tensor(0x1000, 64)))
