"""From the domain types to messages and back, and the refusal of messages that mean nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weight_broker.digest import ContentDigests, DigestAlgorithm, DigestCoverage
from weight_broker.errors import InvalidArgument
from weight_broker.key import ParallelRank, Role, Stage, WeightSetKey
from weight_broker.layout import ITEM_SIZES, Layout, MemoryFormat, TensorSpec
from weight_broker.v1 import weight_set_pb2 as pb
from weight_broker.wire import (
    coverage_from_wire,
    coverage_to_wire,
    digests_from_wire,
    digests_to_wire,
    key_from_wire,
    key_to_wire,
    layout_from_wire,
    layout_to_wire,
)

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
GROUPS = st.integers(1, 1000).flatmap(lambda size: st.tuples(st.integers(0, size - 1), st.just(size)))
RANKS = st.tuples(GROUPS, GROUPS, GROUPS, GROUPS).map(
    lambda groups: ParallelRank(*(number for group in groups for number in group))
)
KEYS = st.builds(
    WeightSetKey,
    TEXTS.filter(bool),
    TEXTS,
    TEXTS,
    TEXTS.filter(bool),
    TEXTS,
    st.sampled_from(Role),
    st.sampled_from(Stage),
    RANKS,
    st.dictionaries(TEXTS.filter(bool), TEXTS, max_size=4),
)
NAMES = st.lists(TEXTS.filter(bool), min_size=1, max_size=6, unique=True)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    specs: list[TensorSpec] = []
    for name in sorted(draw(NAMES)):
        own = [spec for spec in specs if not spec.alias_of]
        tied: bool = bool(own) and draw(st.booleans())
        if tied:
            target: TensorSpec = draw(st.sampled_from(own))
            specs.append(
                TensorSpec(
                    name,
                    target.dtype,
                    target.shape,
                    target.stride,
                    target.storage_bytes,
                    draw(st.integers(0, 2**40)),
                    target.memory_format,
                    target.name,
                )
            )
            continue
        dtype = draw(st.sampled_from(sorted(ITEM_SIZES)))
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
        stride, step = [0] * len(shape), 1
        for axis in draw(st.permutations(range(len(shape)))):
            stride[axis] = step
            step *= max(1, shape[axis]) + draw(st.integers(0, 2))
        span = sum((size - 1) * distance for size, distance in zip(shape, stride, strict=True)) + 1
        storage_bytes = 0 if 0 in shape else span * ITEM_SIZES[dtype]
        memory_format = draw(st.sampled_from(MemoryFormat))
        if memory_format is MemoryFormat.FRACTAL_NZ:
            storage_bytes += draw(st.integers(0, 512))
        specs.append(
            TensorSpec(name, dtype, shape, tuple(stride), storage_bytes, draw(st.integers(0, 9)), memory_format)
        )
    return Layout(specs)


@given(KEYS)
def test_a_key_survives_the_wire(key: WeightSetKey) -> None:
    message = pb.WeightSetKey.FromString(key_to_wire(key).SerializeToString())
    found = key_from_wire(message)
    assert (found, found.id) == (key, key.id)


@given(layouts())
def test_a_layout_survives_the_wire(layout: Layout) -> None:
    message = pb.Layout.FromString(layout_to_wire(layout).SerializeToString())
    found = layout_from_wire(message)
    assert found.tensors == layout.tensors
    assert found.fingerprint == layout.fingerprint


@given(
    st.sampled_from(DigestAlgorithm),
    st.sampled_from(DigestCoverage),
    st.integers(512, 1 << 30),
    st.lists(st.integers(0, 2**64 - 1), max_size=5),
)
def test_digests_survive_the_wire(
    algorithm: DigestAlgorithm, coverage: DigestCoverage, block_bytes: int, values: list[int]
) -> None:
    digests = ContentDigests(algorithm, coverage, block_bytes, tuple(values))
    message = pb.ContentDigests.FromString(digests_to_wire(digests).SerializeToString())
    assert digests_from_wire([message, message], len(values)) == (digests, digests)


@pytest.mark.parametrize("coverage", [*DigestCoverage, None])
def test_a_coverage_survives_the_wire(coverage: DigestCoverage | None) -> None:
    assert coverage_from_wire(coverage_to_wire(coverage)) is coverage


def test_a_coverage_of_a_later_version_is_none() -> None:
    assert coverage_from_wire(77) is None  # type: ignore[arg-type]


def with_key(change: Callable[[pb.WeightSetKey], object]) -> pb.WeightSetKey:
    message = key_to_wire(WeightSetKey("model", engine_attributes={"a": "b"}))
    change(message)
    return message


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("key.model", lambda key: key.ClearField("model")),
        ("key.dtype", lambda key: key.ClearField("dtype")),
        ("key.role", lambda key: key.ClearField("role")),
        ("key.role", lambda key: setattr(key, "role", 77)),
        ("key.stage", lambda key: key.ClearField("stage")),
        ("key.stage", lambda key: setattr(key, "stage", -1)),
        ("rank.tensor_parallel_size", lambda key: key.ClearField("rank")),
        ("rank.expert_parallel_rank", lambda key: setattr(key.rank, "expert_parallel_rank", 1)),
        ("rank.data_parallel_size", lambda key: setattr(key.rank, "data_parallel_size", 2**32 - 1)),
        ("key.engine_attributes", lambda key: key.engine_attributes.add(name="a", value="c")),
        ("key.engine_attributes name", lambda key: key.engine_attributes.add(value="c")),
    ],
)
def test_a_key_message_with_a_wrong_field_is_refused_by_name(
    field: str, change: Callable[[pb.WeightSetKey], object]
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        key_from_wire(with_key(change))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("layout.tensors", lambda layout: layout.ClearField("tensors")),
        ("layout.tensors", lambda layout: layout.tensors.reverse()),
        ("layout.tensors.name", lambda layout: layout.tensors.append(layout.tensors[1])),
        ("layout.fingerprint", lambda layout: layout.ClearField("fingerprint")),
        ("layout.fingerprint", lambda layout: setattr(layout, "fingerprint", "0" * 64)),
        ("layout.fingerprint", lambda layout: setattr(layout.tensors[0], "dtype", "int32")),
        ("layout.tensors[a].memory_format", lambda layout: layout.tensors[0].ClearField("memory_format")),
        ("layout.tensors[a].memory_format", lambda layout: setattr(layout.tensors[0], "memory_format", 77)),
        ("layout.tensors[a].dtype", lambda layout: layout.tensors[0].ClearField("dtype")),
        ("layout.tensors[a].stride", lambda layout: layout.tensors[0].ClearField("stride")),
        ("layout.tensors[a].shape", lambda layout: layout.tensors[0].shape.__setitem__(0, -(2**63))),
        ("layout.tensors[a].storage_bytes", lambda layout: layout.tensors[0].shape.__setitem__(0, 2**63 - 1)),
        ("layout.tensors[a].storage_bytes", lambda layout: setattr(layout.tensors[0], "storage_bytes", 2**64 - 1)),
        ("layout.tensors[a].storage_offset", lambda layout: setattr(layout.tensors[0], "storage_offset", -1)),
        ("layout.tensors[b].alias_of", lambda layout: setattr(layout.tensors[1], "alias_of", "c")),
    ],
)
def test_a_layout_message_with_a_wrong_field_is_refused_by_name(
    field: str, change: Callable[[pb.Layout], object]
) -> None:
    message = layout_to_wire(
        Layout([TensorSpec("a", "float32", (2,), (1,), 8), TensorSpec("b", "float32", (2,), (1,), 8)])
    )
    change(message)
    with pytest.raises(InvalidArgument) as caught:
        layout_from_wire(message)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("digests[0].algorithm", lambda digests: digests.ClearField("algorithm")),
        ("digests[0].algorithm", lambda digests: setattr(digests, "algorithm", 77)),
        ("digests[0].coverage", lambda digests: digests.ClearField("coverage")),
        ("digests[0].coverage", lambda digests: setattr(digests, "coverage", -1)),
        ("digests[0].block_bytes", lambda digests: digests.ClearField("block_bytes")),
        ("digests[0].block_bytes", lambda digests: setattr(digests, "block_bytes", 2**32 - 1)),
        ("digests[0].values", lambda digests: digests.values.append(1)),
        ("digests[0].values", lambda digests: digests.ClearField("values")),
    ],
)
def test_digests_with_a_wrong_field_are_refused_by_name(
    field: str, change: Callable[[pb.ContentDigests], object]
) -> None:
    message = digests_to_wire(ContentDigests(DigestAlgorithm.CRC32, DigestCoverage.SAMPLED, 4096, (1, 2)))
    change(message)
    with pytest.raises(InvalidArgument) as caught:
        digests_from_wire([message], 2)
    assert caught.value.field == field


def test_a_weight_set_without_digests_is_refused() -> None:
    with pytest.raises(InvalidArgument) as caught:
        digests_from_wire([], 2)
    assert caught.value.field == "digests"


def test_a_reader_passes_over_digests_that_only_a_newer_version_knows() -> None:
    known = ContentDigests(DigestAlgorithm.CRC32, DigestCoverage.SAMPLED, 4096, (1, 2))
    newer = digests_to_wire(known)
    newer.algorithm = 99  # type: ignore[assignment]
    assert digests_from_wire([newer, digests_to_wire(known)], 2, pass_over_unknown=True) == (known,)
    with pytest.raises(InvalidArgument, match="known kind"):
        digests_from_wire([newer], 2, pass_over_unknown=True)


def test_a_layout_is_translated_the_same_way_each_time_whatever_came_between() -> None:
    one = Layout([TensorSpec("w", "float32", (2, 3), (3, 1), 24, 7)])
    other = Layout([TensorSpec("w", "float32", (3, 2), (2, 1), 24), TensorSpec("x", "int8", (), (), 1)])
    expected = layout_to_wire(one).SerializeToString(deterministic=True)
    assert layout_from_wire(layout_to_wire(one)) == one
    assert layout_from_wire(layout_to_wire(other)) == other
    assert layout_from_wire(layout_to_wire(other, pb.Layout())) == other
    assert layout_to_wire(one).SerializeToString(deterministic=True) == expected


def test_a_layout_that_is_gone_is_not_taken_for_the_next_one_at_its_address() -> None:
    for size in range(1, 200):
        layout = Layout([TensorSpec("w", "uint8", (size,), (1,), size)])
        assert layout_to_wire(layout).tensors[0].shape == [size]
        del layout
