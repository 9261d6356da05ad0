"""Describing the caller's tensors: what is understood, which are one another's aliases, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from weight_broker.errors import InvalidArgument
from weight_broker.layout import ITEM_SIZES
from weight_broker.memory.tensors import describe

MATRIX = torch.arange(12, dtype=torch.float32).view(3, 4)
CUBE = torch.zeros(4, 5, 6)
SUB_BYTE_TYPE: torch.dtype = vars(torch)["uint4"]


def one(tensor: object) -> Any:
    (described,) = describe({"w": tensor}).tensors
    return described


@pytest.mark.parametrize(
    ("tensor", "shape", "stride", "storage_bytes", "offset"),
    [
        (MATRIX, (3, 4), (4, 1), 48, 0),
        (MATRIX.t(), (4, 3), (1, 4), 48, 0),
        (CUBE.permute(2, 0, 1), (6, 4, 5), (1, 30, 6), 480, 0),
        (MATRIX[1:], (2, 4), (4, 1), 32, 4),
        (MATRIX[:, 1:3], (3, 2), (4, 1), 40, 1),
        (MATRIX[::2, ::3], (2, 2), (8, 3), 48, 0),
        (MATRIX[1, 2], (), (), 4, 6),
        (MATRIX[:, :0], (3, 0), (4, 1), 0, 0),
        (MATRIX.as_strided((1, 4), (77, 1)), (1, 4), (77, 1), 16, 0),
        (torch.nn.Parameter(MATRIX.clone()), (3, 4), (4, 1), 48, 0),
    ],
)
def test_a_torch_tensor_is_described_as_it_lies_in_memory(
    tensor: torch.Tensor, shape: tuple[int, ...], stride: tuple[int, ...], storage_bytes: int, offset: int
) -> None:
    found = one(tensor)
    assert (found.spec.shape, found.spec.stride) == (shape, stride)
    assert (found.spec.storage_bytes, found.spec.storage_offset) == (storage_bytes, offset)
    assert found.address == (tensor.data_ptr() if storage_bytes else 0)
    assert (found.owner is tensor, found.framework, found.spec.dtype) == (True, "torch", "float32")


@pytest.mark.parametrize("dtype", sorted(ITEM_SIZES))
def test_every_torch_type_has_its_name_and_size(dtype: str) -> None:
    spec = one(torch.empty(3, dtype=getattr(torch, dtype))).spec
    assert (spec.dtype, spec.storage_bytes) == (dtype, 3 * ITEM_SIZES[dtype])


NUMPY_TYPES = sorted(name for name in ITEM_SIZES if hasattr(np, name))


@pytest.mark.parametrize("dtype", NUMPY_TYPES)
def test_a_numpy_array_has_the_layout_of_the_equal_torch_tensor(dtype: str) -> None:
    array, tensor = np.zeros((3, 4), dtype), torch.zeros(3, 4, dtype=getattr(torch, dtype))
    views: list[Callable[[Any], Any]] = [lambda it: it, lambda it: it.T, lambda it: it[:, 1:], lambda it: it[1, 1:2]]
    for view in views:
        mine, theirs = describe({"w": view(array)}), describe({"w": view(tensor)})
        assert mine.layout.fingerprint == theirs.layout.fingerprint


def test_the_types_of_ml_dtypes_have_the_names_of_torch() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        assert one(np.zeros(3, getattr(ml_dtypes, name))).spec.dtype == name


def test_a_numpy_array_lies_where_numpy_says() -> None:
    array = np.zeros((4, 6), "float32")[1:, 2:]
    assert one(array).address == array.ctypes.data
    assert one(np.array(7.0)).spec.shape == ()


def test_tensors_are_sorted_by_name() -> None:
    described = describe({"b": torch.zeros(1), "a": np.zeros(2), "B": torch.zeros(3)})
    assert [tensor.spec.name for tensor in described.tensors] == ["B", "a", "b"] == [s.name for s in described.layout]
    assert described.device_kind == "cpu"


def test_names_for_the_same_memory_are_aliases_of_the_first_of_them() -> None:
    weight = torch.nn.Parameter(torch.zeros(3, 4))
    described = describe({"z": weight, "head": weight.detach(), "embed": weight.view(3, 4), "own": weight.clone()})
    assert {spec.name: spec.alias_of for spec in described.layout} == {
        "embed": "",
        "head": "embed",
        "own": "",
        "z": "embed",
    }
    assert described.layout.content_bytes == 96


def test_an_array_that_shares_the_memory_of_a_torch_tensor_is_an_alias() -> None:
    weight = torch.zeros(3, 4)
    assert describe({"a": weight, "b": weight.numpy()}).layout[1].alias_of == "a"


@pytest.mark.parametrize(
    "view",
    [
        lambda weight: weight.t(),
        lambda weight: weight[1:],
        lambda weight: weight[:, :2],
        lambda weight: weight.view(torch.int32),
        lambda weight: weight.view(16),
    ],
)
def test_tensors_that_share_only_some_of_it_are_not_aliases(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weight = torch.zeros(4, 4)
    assert describe({"a": weight, "b": view(weight)}).layout[1].alias_of == ""


def test_tensors_without_elements_are_not_aliases() -> None:
    assert [spec.alias_of for spec in describe({"a": torch.zeros(0), "b": torch.zeros(0)}).layout] == ["", ""]


def freed(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


def shrunk(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().resize_(44)
    return tensor


@pytest.mark.parametrize(
    ("field", "hint", "make"),
    [
        ("device", "to_empty", lambda: torch.zeros(3, device="meta")),
        ("layout", "to_dense", lambda: torch.eye(3).to_sparse()),
        ("layout", "to_dense", lambda: torch.eye(4).to_sparse_csr()),
        ("dtype", "int_repr", lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)),
        ("dtype", "whole bytes", lambda: torch.empty(4, dtype=SUB_BYTE_TYPE)),
        ("stride", "contiguous", lambda: torch.zeros(1, 3).expand(4, 3)),
        ("stride", "contiguous", lambda: torch.zeros(9).as_strided((3, 3), (2, 1))),
        ("stride", "contiguous", lambda: torch.zeros(20).as_strided((3, 3), (4, 4))),
        ("memory", "resolve_conj", lambda: torch.zeros(3, dtype=torch.complex64).conj()),
        ("memory", "resolve_neg", lambda: torch.zeros(3, dtype=torch.complex64).conj().imag),
        ("memory", "Materialise", torch.nn.parameter.UninitializedParameter),
        ("memory", "freed or resized", lambda: freed(torch.zeros(3))),
        ("memory", "freed or resized", lambda: shrunk(torch.zeros(12))),
        ("strides", "ascontiguousarray", lambda: np.zeros(3)[::-1]),
        ("strides", "ascontiguousarray", lambda: np.zeros(3, "i4,i8")["f1"]),
        ("stride", "array()", lambda: np.broadcast_to(np.zeros(3), (4, 3))),
        ("dtype", "newbyteorder", lambda: np.zeros(3, ">f4")),
        ("dtype", "one of", lambda: np.zeros(3, "i4,i4")),
        ("dtype", "one of", lambda: np.array([None])),
        ("dtype", "one of", lambda: np.array(["text"])),
        ("dtype", "one of", lambda: np.zeros(3, "datetime64[s]")),
        ("dtype", "one of", lambda: np.zeros(3, np.longdouble)),
        ("type", "mask", lambda: np.ma.zeros(3)),
        ("type", "torch.Tensor", lambda: [1.0, 2.0]),
        ("type", "torch.Tensor", lambda: None),
    ],
)
def test_what_cannot_be_shared_is_refused_with_its_name_and_a_way_out(
    field: str, hint: str, make: Callable[[], object]
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        describe({"good": torch.zeros(3), "layers.0.w": make()})
    assert caught.value.field == f"tensors[layers.0.w].{field}"
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "field"),
    [
        ([torch.zeros(3)], "tensors"),
        ({7: torch.zeros(3)}, "tensors"),
        ({}, "layout.tensors"),
        ({"": torch.zeros(3)}, "layout.tensors.name"),
        ({"undecodable \udc80": torch.zeros(3)}, "layout.tensors.name"),
    ],
)
def test_what_is_not_a_mapping_of_names_to_tensors_is_refused(tensors: Any, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        describe(tensors)
    assert caught.value.field == field


def test_a_read_only_array_can_be_described_but_not_filled() -> None:
    array = np.zeros(3)
    describe({"w": array}).require_writable()
    array.flags.writeable = False
    described = describe({"good": torch.zeros(3), "w": array})
    with pytest.raises(InvalidArgument, match=r"tensors\[w\]\.memory is 'read-only'"):
        described.require_writable()


def test_tensors_made_in_inference_mode_are_understood() -> None:
    with torch.inference_mode():
        weight = torch.zeros(3, 4).t()
    assert one(weight).spec.stride == (1, 4)


def test_numpy_arrays_are_described_without_torch() -> None:
    program = (
        "import sys, numpy; from weight_broker.memory import describe; "
        "print(describe({'w': numpy.zeros(3)}).layout.content_bytes, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["24", "False"]


def test_the_same_tensors_have_the_same_layout_object_and_others_another() -> None:
    tensors = {"a": torch.zeros(3, 4), "b": torch.zeros(5)}
    first = describe(tensors).layout
    assert describe({name: torch.ones_like(tensor) for name, tensor in tensors.items()}).layout is first
    for name, other in (("a", torch.zeros(4, 3)), ("b", torch.zeros(5, dtype=torch.int32)), ("c", torch.zeros(1))):
        assert describe({**tensors, name: other}).layout != first
    assert describe({"a": tensors["a"]}).layout != first
    assert describe(tensors).layout == first


def test_a_very_large_layout_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weight_broker.memory.described._KEPT_TENSORS", 1)
    tensors = {"only here": torch.zeros(3), "and here": torch.zeros(3)}
    assert describe(tensors).layout is not describe(tensors).layout
