"""Tensors in device memory, described: by their pointers, and torch_npu's."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from support.torch_npu_double import TorchNpu, on_npu
from weight_broker.errors import InvalidArgument
from weight_broker.layout import MemoryFormat
from weight_broker.memory import describe, export
from weight_broker.memory.npu.kind import DescribedDeviceTensors, DeviceTensor, Segment, SegmentKind, describe_device

TENSOR = DeviceTensor(0x1000, "bfloat16", (4, 6), (6, 1), 48, device_index=1)


@pytest.fixture
def torch_npu(monkeypatch: pytest.MonkeyPatch) -> TorchNpu:
    double = TorchNpu()
    monkeypatch.setitem(sys.modules, "torch_npu", double.module)
    return double


def describe_on_device(**tensors: object) -> DescribedDeviceTensors:
    described = describe(tensors)
    assert isinstance(described, DescribedDeviceTensors)
    return described


def test_whatever_has_a_device_pointer_is_described() -> None:
    described = describe_on_device(b=TENSOR, a=replace(TENSOR, address=0x2000, dtype="int8", storage_bytes=24))
    assert (described.device_kind, described.device_index) == ("npu", 1)
    assert [spec.name for spec in described.layout] == ["a", "b"]
    assert [tensor.address for tensor in described.tensors] == [0x2000, 0x1000]
    assert described.synchronize is None
    assert described.segments is None


def test_aliases_are_found_and_differences_are_not_taken_for_them() -> None:
    described = describe_on_device(
        a=TENSOR,
        same=TENSOR,
        transposed=replace(TENSOR, shape=(6, 4), stride=(1, 6)),
        nz=replace(TENSOR, memory_format=MemoryFormat.FRACTAL_NZ, storage_bytes=512),
        empty=replace(TENSOR, address=0, shape=(0, 6), storage_bytes=0),
        void=replace(TENSOR, address=0, shape=(0, 6), storage_bytes=0),
    )
    assert {spec.name: spec.alias_of for spec in described.layout if spec.alias_of} == {"same": "a"}


def test_a_padded_format_keeps_its_padding_and_is_part_of_the_fingerprint() -> None:
    padded = replace(TENSOR, memory_format=MemoryFormat.FRACTAL_NZ, storage_bytes=512)
    (spec,) = describe_on_device(w=padded).layout
    assert (spec.memory_format, spec.storage_bytes, spec.content_bytes) == (MemoryFormat.FRACTAL_NZ, 512, 512)
    variants = (TENSOR, padded, replace(padded, storage_bytes=1024))
    assert len({describe_on_device(w=variant).layout.fingerprint for variant in variants}) == 3


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("stride", {"stride": (8, 1), "storage_bytes": 60}),  # gaps
        ("stride", {"stride": (1, 1), "storage_bytes": 18}),  # overlaps
        ("stride", {"shape": (3, 3), "stride": (2, 2), "storage_bytes": 18}),  # both, and as long as without either
        ("stride", {"storage_bytes": 47}),
        ("address", {"address": 0}),
        ("address", {"address": -1}),
        ("dtype", {"dtype": "quint8", "storage_bytes": 24}),
        ("stride", {"stride": (6,)}),
        ("storage_bytes", {"memory_format": MemoryFormat.FRACTAL_NZ, "storage_bytes": 47}),
    ],
)
def test_what_cannot_be_shared_is_refused_by_its_name(field: str, change: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=rf"tensors\[bad\]\.{field} "):
        describe({"bad": replace(TENSOR, **change), "good": TENSOR})


def test_tensors_of_two_devices_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"tensors\[b\]\.device is 'npu:0'; expected npu:1, as 'a' is\. Publish"):
        describe({"a": TENSOR, "b": replace(TENSOR, device_index=0)})


@pytest.mark.parametrize("other", [torch.ones(2), np.ones(2), 7])
@pytest.mark.parametrize("name", ["a", "z"])  # before and after the device's
def test_memory_of_the_host_among_the_devices_is_refused(name: str, other: object) -> None:
    with pytest.raises(InvalidArgument, match=rf"tensors\[{name}\]"):
        describe({"device": TENSOR, name: other})


def test_what_copies_through_addresses_refuses_those_of_a_device() -> None:
    with pytest.raises(InvalidArgument, match=r"tensors\.device is 'npu'; expected host memory"):
        export(describe({"a": TENSOR}))


# ---- torch_npu's
def test_a_tensor_of_torch_npu_is_described_by_its_storage_and_format(torch_npu: TorchNpu) -> None:
    whole = torch.zeros(8, 6, dtype=torch.bfloat16)
    described = describe_on_device(
        part=on_npu(whole[2:5], index=3),
        transposed=on_npu(whole.T, index=3),
        tied=on_npu(whole.T, index=3),
        nz=on_npu(torch.zeros(512, dtype=torch.int8)[:15].view(3, 5), index=3, format_number=29, elements=512),
    )
    assert described.device_index == 3
    specs = {spec.name: spec for spec in described.layout}
    assert (specs["part"].storage_offset, specs["part"].storage_bytes, specs["part"].shape) == (12, 36, (3, 6))
    assert (specs["tied"].stride, specs["tied"].alias_of, specs["transposed"].alias_of) == ((1, 6), "", "tied")
    assert (specs["nz"].memory_format, specs["nz"].storage_bytes) == (MemoryFormat.FRACTAL_NZ, 512)
    addresses = {tensor.spec.name: tensor.address for tensor in described.tensors}
    assert addresses["part"] == whole.data_ptr() + 24
    assert all(tensor.owner is not None for tensor in described.tensors)


@pytest.mark.parametrize(
    ("number", "memory_format"),
    [
        (50, MemoryFormat.FRACTAL_NZ_C0_16),
        (51, MemoryFormat.FRACTAL_NZ_C0_32),
        (52, MemoryFormat.FRACTAL_NZ_C0_2),
        (53, MemoryFormat.FRACTAL_NZ_C0_4),
        (54, MemoryFormat.FRACTAL_NZ_C0_8),
    ],
)
def test_the_other_fractal_formats_are_whole_storages_and_each_is_another_format(
    torch_npu: TorchNpu, number: int, memory_format: MemoryFormat
) -> None:
    whole = torch.zeros(512, dtype=torch.int8)[:15].view(3, 5)
    (spec,) = describe_on_device(w=on_npu(whole, format_number=number, elements=512)).layout
    assert (spec.memory_format, spec.storage_bytes) == (memory_format, 512)


@pytest.mark.parametrize("number", [0, 1, 2, 30])
def test_base_formats_are_plain_memory(torch_npu: TorchNpu, number: int) -> None:
    (spec,) = describe_on_device(w=on_npu(torch.zeros(3, 5), format_number=number)).layout
    assert spec.memory_format is MemoryFormat.STRIDED


@pytest.mark.parametrize(
    ("said", "tensor"),
    [
        (r"format is 3; .*npu_format_cast\(tensor, 2\)", lambda: on_npu(torch.zeros(3), format_number=3)),
        (r"storage_offset is 4; .*whole storages", lambda: on_npu(torch.zeros(9)[4:], format_number=29, elements=5)),
        (r"memory is '36 bytes'", lambda: on_npu(torch.zeros(9), format_number=29, elements=10)),
        (r"stride is \(2,\); .*contiguous", lambda: on_npu(torch.zeros(9)[::2])),
        (r"memory is .*resolve_conj", lambda: on_npu(torch.zeros(3, dtype=torch.complex64).conj())),
        (r"dtype is torch\.bits8; .*Share the integers", lambda: on_npu(torch.empty(8, dtype=torch.bits8))),
    ],
)
def test_what_torch_npu_cannot_share_is_refused_with_a_way_out(torch_npu: TorchNpu, said: str, tensor: Any) -> None:
    with pytest.raises(InvalidArgument, match=rf"tensors\[w\]\.{said}"):
        describe({"w": tensor()})


def test_tensors_of_torch_npu_come_with_their_allocators_segments_and_its_queue(torch_npu: TorchNpu) -> None:
    row = {"device": 0, "address": 0x1000, "total_size": 2 << 20, "segment_type": "small", "is_expandable": False}
    torch_npu.snapshot = [
        row,
        {**row, "address": 0x2000, "segment_type": "large", "is_expandable": True, "segment_pool_id": (0, 0)},
        {**row, "address": 0x3000, "is_expandable": True, "segment_pool_id": (1, 0)},
        {**row, "device": 1},
    ]
    described = describe_on_device(w=on_npu(torch.zeros(3)), v=on_npu(torch.ones(3), index=None))
    assert described.segments is not None
    assert described.segments() == [
        Segment(0x1000, 2 << 20, device_index=0),
        Segment(0x2000, 2 << 20, SegmentKind.VMM, device_index=0),
        Segment(0x3000, 2 << 20, SegmentKind.VMM, device_index=0, sleeps=True),
    ]
    assert described.synchronize is not None
    described.synchronize()
    assert torch_npu.synchronized == [0]


def test_describing_does_not_ask_torch_npu_for_tensors_that_have_only_a_pointer() -> None:
    assert "torch_npu" not in sys.modules
    describe_device({"a": TENSOR})
