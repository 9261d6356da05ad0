"""The layout of a weight set: its fingerprint, pinned, what tells two apart, and the refusal of impossible ones."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weight_broker.errors import InvalidArgument
from weight_broker.layout import (
    ITEM_SIZES,
    MAX_DIMENSIONS,
    MAX_NAME_CHARACTERS,
    MAX_TENSOR_BYTES,
    Layout,
    MemoryFormat,
    TensorSpec,
    differences,
)

SPECS = (
    TensorSpec("b", "bfloat16", (2, 3), (3, 1), 12, 5),
    TensorSpec("a", "float32", (), (), 4),
    TensorSpec("c", "bfloat16", (2, 3), (3, 1), 12, alias_of="b"),
    TensorSpec("é", "int8", (0, 4), (4, 1), 0),
    TensorSpec("nz", "int8", (3, 3), (3, 1), 512, memory_format=MemoryFormat.FRACTAL_NZ),
)
# Other implementations have to arrive at the same: never change these, add a form with another number instead.
CANONICAL = (
    '["layout/1",[["a","float32",[],[],4,"strided",""],["b","bfloat16",[2,3],[3,1],12,"strided",""],'
    '["c","bfloat16",[2,3],[3,1],12,"strided","b"],["nz","int8",[3,3],[3,1],512,"fractal_nz",""],'
    '["é","int8",[0,4],[4,1],0,"strided",""]]]'
)
FINGERPRINT = "802a777c8577e425b9314802635bb49fef0ca185792a050b2c14c71ff799540c"
MATRIX = TensorSpec("w", "float32", (2, 3), (3, 1), 24)


def test_the_fingerprint_is_what_it_always_was() -> None:
    assert hashlib.sha256(CANONICAL.encode()).hexdigest() == FINGERPRINT
    assert Layout(SPECS).fingerprint == FINGERPRINT


@given(st.permutations(SPECS))
def test_the_order_in_which_tensors_are_given_does_not_matter(specs: list[TensorSpec]) -> None:
    layout = Layout(specs)
    assert [spec.name for spec in layout] == ["a", "b", "c", "nz", "é"]
    assert (layout, hash(layout), layout.fingerprint) == (Layout(SPECS), hash(Layout(SPECS)), FINGERPRINT)


def test_where_an_instance_keeps_a_tensor_is_not_part_of_the_fingerprint() -> None:
    assert Layout([MATRIX._replace(storage_offset=77)]).fingerprint == Layout([MATRIX]).fingerprint


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        (MATRIX._replace(dtype="int32"), "w.dtype: resident float32, wanted int32"),
        (TensorSpec("w", "float32", (3, 2), (2, 1), 24), "w.shape: resident 2x3, wanted 3x2"),
        (MATRIX._replace(stride=(1, 2)), "w.stride: resident 3x1, wanted 1x2"),
        (MATRIX._replace(stride=(4, 1), storage_bytes=28), "w.storage_bytes: resident 24, wanted 28"),
        (
            MATRIX._replace(memory_format=MemoryFormat.FRACTAL_NZ),
            "w.memory_format: resident strided, wanted fractal_nz",
        ),
        (TensorSpec("w", "float32", (), (), 4), "w.shape: resident 2x3, wanted scalar"),
    ],
)
def test_every_other_field_changes_the_fingerprint_and_is_named(changed: TensorSpec, difference: str) -> None:
    resident, wanted = Layout([MATRIX]), Layout([changed])
    assert resident.fingerprint != wanted.fingerprint
    assert difference in differences(resident, wanted)


def test_a_tied_tensor_differs_from_one_of_its_own() -> None:
    other = MATRIX._replace(name="x")
    tied = Layout([MATRIX, other._replace(alias_of="w")])
    assert differences(tied, Layout([MATRIX, other])) == ["x.alias_of: resident w, wanted none"]
    assert tied.fingerprint != Layout([MATRIX, other]).fingerprint


def test_missing_and_extra_tensors_are_named() -> None:
    resident, wanted = Layout([MATRIX]), Layout([MATRIX._replace(name="v")])
    assert differences(resident, wanted) == [
        "w: missing from the receiver's tensors",
        "v: not in the resident weight set",
    ]


def test_equal_layouts_do_not_differ() -> None:
    assert differences(Layout(SPECS), Layout(SPECS)) == []


def test_many_differences_are_cut_short_and_counted() -> None:
    resident = Layout([MATRIX._replace(name=f"r{index}") for index in range(9)])
    wanted = Layout([MATRIX._replace(name=f"w{index}") for index in range(9)])
    found = differences(resident, wanted, limit=5)
    assert len(found) == 6
    assert found[-1] == "and 13 more"


def test_of_very_many_differences_so_many_are_counted() -> None:
    resident = Layout([MATRIX._replace(name=f"r{index}") for index in range(1009)])
    assert differences(resident, Layout([MATRIX]))[-1] == "and more than 1000 more"
    assert differences(Layout(resident[:1007]), Layout([MATRIX]))[-1] == "and 1000 more"


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000])
def test_a_difference_anywhere_in_a_large_layout_is_named_and_nothing_else(count: int) -> None:
    specs = [MATRIX._replace(name=f"{index:04}") for index in range(count)]
    whole = Layout(specs)
    for index in {0, count // 2, count - 1}:
        other = [*specs[:index], specs[index]._replace(dtype="int32"), *specs[index + 1 :]]
        assert differences(whole, Layout(other)) == [f"{index:04}.dtype: resident float32, wanted int32"]
        surplus = Layout([*specs, MATRIX._replace(name=f"{index:04}.more")])
        assert differences(whole, surplus) == [f"{index:04}.more: not in the resident weight set"]
        assert differences(surplus, whole) == [f"{index:04}.more: missing from the receiver's tensors"]


def test_where_an_instance_keeps_its_tensors_is_no_difference() -> None:
    specs = [MATRIX._replace(name=f"{index:04}") for index in range(300)]
    assert differences(Layout(specs), Layout([spec._replace(storage_offset=7) for spec in specs])) == []


@pytest.mark.parametrize(
    ("spec", "dense", "content"),
    [
        (MATRIX, True, 24),
        (MATRIX._replace(stride=(1, 2)), True, 24),
        (MATRIX._replace(stride=(5, 1), storage_bytes=32), False, 24),
        (TensorSpec("w", "float32", (2, 0), (9, 9), 0), True, 0),
        (TensorSpec("w", "float32", (1, 3), (999, 1), 12), True, 12),
        (TensorSpec("w", "complex128", (), (), 16), True, 16),
        (MATRIX._replace(memory_format=MemoryFormat.FRACTAL_NZ, storage_bytes=512), True, 512),
    ],
)
def test_gaps_do_not_count_as_content(spec: TensorSpec, dense: bool, content: int) -> None:
    assert (spec.is_dense, spec.content_bytes) == (dense, content)
    assert Layout([spec]).content_bytes == content


def test_aliases_count_once() -> None:
    assert Layout([MATRIX, MATRIX._replace(name="x", alias_of="w")]).content_bytes == 24


@pytest.mark.parametrize("dtype", sorted(ITEM_SIZES))
def test_every_type_has_its_item_size(dtype: str) -> None:
    size = ITEM_SIZES[dtype]
    assert Layout([TensorSpec("w", dtype, (3,), (1,), 3 * size)]).content_bytes == 3 * size


@pytest.mark.parametrize(
    ("field", "specs"),
    [
        ("layout.tensors", []),
        ("layout.tensors.name", [MATRIX, MATRIX]),
        ("layout.tensors.name", [MATRIX._replace(name="")]),
        ("layout.tensors.name", [MATRIX._replace(name="n" * (MAX_NAME_CHARACTERS + 1))]),
        ("layout.tensors.name", [MATRIX._replace(name="undecodable \udc80")]),
        ("layout.tensors[w].dtype", [MATRIX._replace(dtype="quint8")]),
        ("layout.tensors[w].dtype", [MATRIX._replace(dtype="")]),
        (
            "layout.tensors[w].shape",
            [TensorSpec("w", "int8", (1,) * (MAX_DIMENSIONS + 1), (1,) * (MAX_DIMENSIONS + 1), 1)],
        ),
        ("layout.tensors[w].shape", [MATRIX._replace(shape=(2, -3))]),
        ("layout.tensors[w].stride", [MATRIX._replace(stride=(1,))]),
        ("layout.tensors[w].stride", [MATRIX._replace(stride=(3, -1))]),
        ("layout.tensors[w].stride", [MATRIX._replace(stride=(0, 1), storage_bytes=12)]),
        ("layout.tensors[w].storage_offset", [MATRIX._replace(storage_offset=-1)]),
        ("layout.tensors[w].storage_bytes", [MATRIX._replace(storage_bytes=23)]),
        ("layout.tensors[w].storage_bytes", [MATRIX._replace(storage_bytes=MAX_TENSOR_BYTES + 1)]),
        (
            "layout.tensors[w].storage_bytes",
            [TensorSpec("w", "int8", (MAX_TENSOR_BYTES + 1,), (1,), MAX_TENSOR_BYTES + 1)],
        ),
        (
            "layout.tensors[w].storage_bytes",
            [MATRIX._replace(memory_format=MemoryFormat.FRACTAL_NZ, storage_bytes=23)],
        ),
        ("layout.tensors[w].alias_of", [MATRIX._replace(alias_of="absent")]),
        ("layout.tensors[w].alias_of", [MATRIX._replace(alias_of="w")]),
        ("layout.tensors[w].alias_of", [MATRIX._replace(alias_of="x"), MATRIX._replace(name="x")]),
        ("layout.tensors[x].alias_of", [MATRIX, MATRIX._replace(name="x", dtype="int32", alias_of="w")]),
        (
            "layout.tensors[y].alias_of",
            [MATRIX, MATRIX._replace(name="x", alias_of="w"), MATRIX._replace(name="y", alias_of="x")],
        ),
    ],
)
def test_an_impossible_layout_is_refused_by_field(field: str, specs: list[TensorSpec]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Layout(specs)
    assert caught.value.field == field
    assert field in str(caught.value)
