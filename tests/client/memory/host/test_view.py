"""Mapped tensors: the writer's own, and mapped as long as they live."""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest
import torch

from support.held_memory import mapped_regions
from weight_broker.errors import InvalidArgument, TransferFailed
from weight_broker.memory.host.export import copy_in, export, map_tensors
from weight_broker.memory.tensors import describe


def test_a_mapped_tensor_is_the_writers_own() -> None:
    described = describe({"w": torch.zeros(1 << 16)})
    region = export(described)

    def attach() -> torch.Tensor:
        tensor: torch.Tensor = map_tensors(described.layout, [region.fd], region.placements)["w"]
        return tensor

    mine, theirs = attach(), attach()
    child = os.fork()
    if child == 0:
        mine[0] = 7
        os._exit(0 if mine[0] == 7 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert mine[0] == 0
    mine[1] = 8
    assert [tensor[1].item() for tensor in (mine, theirs, attach())] == [8, 0, 0]
    target = {"w": torch.ones(1 << 16)}
    copy_in(describe(target), [region.fd], region.placements, region.digests)
    region.close()
    assert not target["w"].any()


@pytest.mark.parametrize("framework", ["torch", "numpy"])
def test_the_memory_stays_mapped_as_long_as_a_tensor_lives_and_no_longer(framework: Any) -> None:
    before = mapped_regions()
    described = describe({"a": torch.arange(1000), "b": torch.arange(5)})
    region = export(described)
    mapped = map_tensors(described.layout, [region.fd], region.placements, framework=framework)
    region.close()
    assert mapped_regions() > before
    last = mapped.pop("b")[1:]
    del mapped
    gc.collect()
    assert last.tolist() == [1, 2, 3, 4]
    del last
    gc.collect()
    assert mapped_regions() == before


def test_a_type_that_the_framework_lacks_is_refused_when_mapping() -> None:
    described = describe({"w": torch.empty(3, dtype=torch.float4_e2m1fn_x2)})
    region = export(described)
    with pytest.raises(InvalidArgument, match="float4_e2m1fn_x2"):
        map_tensors(described.layout, [region.fd], region.placements, framework="numpy")
    with pytest.raises(InvalidArgument, match="framework"):
        map_tensors(described.layout, [region.fd], region.placements, framework="jax")  # type: ignore[arg-type]
    region.close()


def test_a_tensor_that_does_not_lie_aligned_is_refused_when_mapping() -> None:
    described = describe({"w": torch.zeros(3)})
    region = export(described)
    with pytest.raises(TransferFailed, match="aligned"):
        map_tensors(described.layout, [region.fd], [(0, 2)])
    region.close()


def test_types_of_machine_learning_are_mapped_as_arrays_of_ml_dtypes() -> None:
    pytest.importorskip("ml_dtypes")
    tensors = {name: torch.arange(6).to(getattr(torch, name)).view(2, 3) for name in ("bfloat16", "float8_e4m3fn")}
    described = describe(tensors)
    region = export(described)
    arrays = map_tensors(described.layout, [region.fd], region.placements, framework="numpy")
    region.close()
    assert {name: (array.dtype.name, array.tolist()) for name, array in arrays.items()} == {
        name: (name, [[0, 1, 2], [3, 4, 5]]) for name in tensors
    }
