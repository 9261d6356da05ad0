"""Host memory round trips: what is exported is what arrives, bit for bit, copied or mapped."""

from __future__ import annotations

import fcntl
import mmap
import os
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.held_memory import held
from weight_broker import digest
from weight_broker.digest import DigestAlgorithm, DigestCoverage
from weight_broker.errors import TransferFailed
from weight_broker.layout import ITEM_SIZES
from weight_broker.memory.host.address_space import Mapping
from weight_broker.memory.host.export import DigestMode, HostRegion, copy_in, export, map_tensors
from weight_broker.memory.tensors import DescribedTensors, describe

GAP_FILL = 0xA5


def elements(tensor: torch.Tensor) -> bytes:
    """The bits of every element in row-major order, whatever the type and the strides."""
    item = tensor.element_size()
    if tensor.numel() == 0:
        return b""
    raw = torch.empty(0, dtype=torch.uint8).set_(
        tensor.untyped_storage(),
        tensor.storage_offset() * item,
        (*tensor.shape, item),
        (*(step * item for step in tensor.stride()), 1),
    )
    return raw.contiguous().numpy().tobytes()


class Plan:
    """How to make a tensor: the same for the publisher and the receiver, but for where it lies and what is in it."""

    def __init__(self, dtype: str, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.dtype, self.shape, self.stride = dtype, shape, stride
        self.span = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))

    def make(self, content: random.Random | None, offset: int) -> torch.Tensor:
        size = (max(self.span, 0) + offset + 3) * ITEM_SIZES[self.dtype]
        fill = content.randbytes(size) if content else bytes([GAP_FILL]) * size
        storage = torch.frombuffer(bytearray(fill), dtype=torch.uint8).untyped_storage()
        return torch.empty(0, dtype=getattr(torch, self.dtype)).set_(storage, offset, self.shape, self.stride)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    stride, step = [0] * len(shape), 1
    for axis in draw(st.permutations(range(len(shape)))):
        stride[axis] = step
        step *= max(1, shape[axis])
        step += draw(st.sampled_from([0, 0, 0, 1, 7]))
    return Plan(draw(st.sampled_from(sorted(ITEM_SIZES))), shape, tuple(stride))


WEIGHT_SETS = st.lists(st.tuples(plans(), st.integers(0, 5), st.integers(0, 5), st.booleans()), min_size=1, max_size=6)
"""For each tensor: what it is, where publisher and receiver keep it, and whether it has a tied twin."""
WeightSet = list[tuple[Plan, int, int, bool]]


def both_sides(weight_set: WeightSet) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    content = random.Random(7)
    source: dict[str, torch.Tensor] = {}
    target: dict[str, torch.Tensor] = {}
    for index, (plan, there, here, tied) in enumerate(weight_set):
        source[f"w{index}"], target[f"w{index}"] = plan.make(content, there), plan.make(None, here)
        if tied:
            source[f"tied{index}"], target[f"tied{index}"] = source[f"w{index}"].detach(), target[f"w{index}"].detach()
    return source, target


def fill(target: DescribedTensors, region: HostRegion, mode: DigestMode = DigestMode.AUTO) -> Any:
    return copy_in(target, [region.fd], region.placements, region.digests, digest_mode=mode)


@settings(max_examples=60, deadline=None)
@given(WEIGHT_SETS, st.sampled_from(DigestMode))
def test_any_tensors_are_filled_with_what_was_exported(weight_set: WeightSet, mode: DigestMode) -> None:
    source, target = both_sides(weight_set)
    untouched = {name: elements_outside(tensor) for name, tensor in target.items()}
    described = describe(target)
    region = export(describe(source), digest_mode=mode)
    try:
        result = fill(described, region, mode)
    finally:
        region.close()
    assert {name: elements(tensor) for name, tensor in target.items()} == {n: elements(t) for n, t in source.items()}
    assert {name: elements_outside(tensor) for name, tensor in target.items()} == untouched
    assert result.size_bytes == described.layout.content_bytes
    assert result.verified is (DigestCoverage.SAMPLED if mode is DigestMode.SAMPLED else DigestCoverage.FULL)


def elements_outside(tensor: torch.Tensor) -> int:
    """How many bytes of the storage are not the tensor's and hold what they were filled with."""
    item = tensor.element_size()
    own = torch.zeros(tensor.untyped_storage().nbytes(), dtype=torch.bool)
    if tensor.numel():
        own.as_strided(
            (*tensor.shape, item), (*(step * item for step in tensor.stride()), 1), tensor.storage_offset() * item
        ).fill_(True)
    raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return int((raw[~own] == GAP_FILL).sum())


@settings(max_examples=60, deadline=None)
@given(WEIGHT_SETS)
def test_any_tensors_are_mapped_as_they_were_exported(weight_set: WeightSet) -> None:
    source, _ = both_sides(weight_set)
    described = describe(source)
    region = export(described)
    try:
        mapped = map_tensors(described.layout, [region.fd], region.placements)
    finally:
        region.close()
    assert mapped.keys() == source.keys()
    for spec in described.layout:
        tensor = mapped[spec.name]
        assert elements(tensor) == elements(source[spec.name])
        assert (tensor.shape, tensor.dtype) == (source[spec.name].shape, source[spec.name].dtype)
        assert (tensor.storage_offset(), tensor.is_leaf, tensor._is_view()) == (0, True, False)
        if spec.is_dense:
            assert tensor.stride() == spec.stride
        else:
            assert tensor.is_contiguous()
        if spec.alias_of:
            assert tensor is mapped[spec.alias_of]


NUMPY_TYPES = sorted(name for name in ITEM_SIZES if hasattr(np, name))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(NUMPY_TYPES), plans()), min_size=1, max_size=5))
def test_arrays_are_filled_and_mapped_as_they_were_exported(chosen: list[tuple[str, Plan]]) -> None:
    content = random.Random(7)
    source: dict[str, Any] = {}
    target: dict[str, Any] = {}
    for index, (dtype, plan) in enumerate(chosen):
        strides = [step * ITEM_SIZES[dtype] for step in plan.stride]
        size = max(plan.span, 0) * ITEM_SIZES[dtype] + 1
        # An odd address, as in a file that was read whole: arrays need not be aligned.
        source[f"w{index}"] = np.ndarray(plan.shape, dtype, bytearray(content.randbytes(size)), 1, strides)
        target[f"w{index}"] = np.ndarray(plan.shape, dtype, bytearray(size), 1, strides)
    described = describe(source)
    region = export(described)
    try:
        fill(describe(target), region)
        mapped = map_tensors(described.layout, [region.fd], region.placements, framework="numpy")
    finally:
        region.close()
    for name, array in source.items():
        assert target[name].tobytes() == array.tobytes() == mapped[name].tobytes()
        assert (mapped[name].dtype, mapped[name].shape) == (array.dtype, array.shape)


def test_numpy_fills_what_torch_published_and_the_other_way_round() -> None:
    with torch.no_grad():
        tensors = {"w": torch.nn.Parameter(torch.randn(5, 7).t()), "gaps": torch.randn(5, 7)[:, 2:]}
    arrays = {"w": np.zeros((5, 7), "float32").T, "gaps": np.zeros((5, 7), "float32")[:, 2:]}
    region = export(describe(tensors))
    fill(describe(arrays), region)
    region.close()
    assert all(np.array_equal(arrays[name], tensors[name].detach().numpy()) for name in tensors)
    arrays["w"] *= 2
    region = export(describe(arrays))
    fill(describe(tensors), region)
    region.close()
    assert all(np.array_equal(arrays[name], tensors[name].detach().numpy()) for name in tensors)


def test_parameters_in_use_and_tensors_of_inference_mode_are_filled() -> None:
    source = {"a": torch.randn(3, 4), "b": torch.randn(4, 6)[:, 1:5]}
    with torch.inference_mode():
        inference = torch.zeros(4, 6)[:, 1:5]
    target = {"a": torch.nn.Parameter(torch.zeros(3, 4)), "b": inference}
    product = target["a"] * 2
    assert product.requires_grad
    region = export(describe(source))
    fill(describe(target), region)
    region.close()
    assert all(torch.equal(target[name], source[name]) for name in source)


def test_large_tensors_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    source = {
        name: torch.randint(0, 256, (size,), dtype=torch.uint8) for name, size in (("a", 9 << 20), ("b", 5_000_001))
    }
    for huge_pages in (True, False):
        if not huge_pages:
            monkeypatch.setattr(Mapping, "back_with_huge_pages", lambda *_: False)
        target = {name: torch.zeros_like(tensor) for name, tensor in source.items()}
        region = export(describe(source))
        fill(describe(target), region)
        region.close()
        assert all(torch.equal(target[name], source[name]) for name in source)


def test_a_region_is_sealed_for_everybody() -> None:
    region = export(describe({"w": torch.ones(1 << 16)}))
    wanted = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    assert fcntl.fcntl(region.fd, fcntl.F_GET_SEALS) & wanted == wanted
    for change in (
        lambda: os.pwrite(region.fd, b"x", 0),
        lambda: os.ftruncate(region.fd, 0),
        lambda: os.ftruncate(region.fd, region.size_bytes + 1),
        lambda: mmap.mmap(region.fd, region.size_bytes),
        lambda: fcntl.fcntl(region.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
    ):
        with pytest.raises(PermissionError):
            change()
    assert not os.get_inheritable(region.fd)
    region.close()


def test_tensors_are_placed_aligned_and_apart() -> None:
    sizes = [1, 63, 0, 64, 65, (64 << 10) - 1, 64 << 10, 1, 70_000]
    tensors = {f"w{index}": torch.zeros(size, dtype=torch.uint8) for index, size in enumerate(sizes)}
    tensors["w9"] = tensors["w8"]
    region = export(describe(tensors))
    assert region.placements[9] == region.placements[8]
    end = 0
    for size, (index, offset) in zip(sizes, region.placements, strict=False):
        assert index == 0
        if size:
            assert offset >= end
            assert offset % (4096 if size >= 64 << 10 else 64) == 0
            end = offset + size
    assert region.size_bytes == os.fstat(region.fd).st_size >= end
    region.close()


def test_closing_a_region_twice_closes_nothing_else() -> None:
    region = export(describe({"w": torch.ones(1)}))
    fd = region.fd
    region.close()
    other = os.open("/dev/null", os.O_RDONLY)
    assert other == fd
    region.close()
    os.fstat(other)
    os.close(other)


def test_copying_leaves_no_mapping_and_no_descriptor() -> None:
    described, before = describe({"w": torch.zeros(1000)}), held()
    region = export(described)
    fill(described, region)
    region.close()
    assert held() == before


def test_tensors_may_lie_in_several_regions() -> None:
    one, two = describe({"a": torch.arange(5)}), describe({"b": torch.arange(7)})
    regions = [export(one), export(two)]
    digests = [
        digest.ContentDigests(f.algorithm, f.coverage, f.block_bytes, f.values + s.values)
        for f, s in zip(regions[0].digests, regions[1].digests, strict=True)
    ]
    target = describe({"a": torch.zeros(5, dtype=torch.int64), "b": torch.zeros(7, dtype=torch.int64)})
    copy_in(target, [regions[1].fd, regions[0].fd], [(1, 0), (0, 0)], digests)
    for region in regions:
        region.close()
    assert [tensor.owner.tolist() for tensor in target.tensors] == [list(range(5)), list(range(7))]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("publisher", "receiver", "expected"),
    [
        (DigestMode.AUTO, DigestMode.AUTO, [(DigestAlgorithm.CRC32, DigestCoverage.SAMPLED)]),
        (DigestMode.FULL, DigestMode.FULL, [(DigestAlgorithm.CRC32, DigestCoverage.FULL)]),
        (DigestMode.FULL, DigestMode.AUTO, [(DigestAlgorithm.CRC32, DigestCoverage.SAMPLED)]),
    ],
)
def test_without_xxhash_crc32_stands_in(
    monkeypatch: pytest.MonkeyPatch, publisher: DigestMode, receiver: DigestMode, expected: list[Any]
) -> None:
    monkeypatch.setattr(digest, "_xxh3_64", None)
    source, target = {"w": torch.randn(100_000)}, {"w": torch.zeros(100_000)}
    region = export(describe(source), digest_mode=publisher)
    assert DigestAlgorithm.XXH3_64 not in [digests.algorithm for digests in region.digests]
    result = fill(describe(target), region, receiver)
    region.close()
    assert [(region.digests[0 if receiver is DigestMode.FULL else -1].algorithm, result.verified)] == expected
    assert torch.equal(target["w"], source["w"])


def test_a_receiver_without_xxhash_verifies_the_sample_of_a_publisher_that_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    region = export(describe({"w": torch.randn(10)}))
    assert [digests.coverage for digests in region.digests] == [DigestCoverage.FULL, DigestCoverage.SAMPLED]
    monkeypatch.setattr(digest, "_xxh3_64", None)
    target = describe({"w": torch.zeros(10)})
    assert fill(target, region).verified is DigestCoverage.SAMPLED
    with pytest.raises(TransferFailed, match="install xxhash on this side, or use digest mode auto") as caught:
        fill(target, region, DigestMode.FULL)
    assert not caught.value.touched
    region.close()


def test_a_receiver_that_has_xxhash_is_not_advised_to_install_it() -> None:
    region = export(describe({"w": torch.randn(10)}), digest_mode=DigestMode.SAMPLED)
    with pytest.raises(TransferFailed, match=r"on the source's side, or publish with digest mode full there"):
        fill(describe({"w": torch.zeros(10)}), region, DigestMode.FULL)
    region.close()
