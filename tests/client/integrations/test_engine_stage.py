"""The weight set of a model that was post-processed: what is filled, and what must be equal on both sides."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from weight_broker.integrations.engine.stage import processed_tensors
from weight_broker.layout import differences
from weight_broker.memory.tensors import describe


class Kernel:
    """An object of nobody's package, whose attributes are in slots."""

    __slots__ = ("scale", "table")

    def __init__(self) -> None:
        self.scale, self.table = 1.0, torch.zeros(3)


class Linear(nn.Module):
    """A layer whose post-processing keeps things in many places."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
        self.kernel = Kernel()
        self.where = torch.device("cuda:0")


def made(change: Callable[[Any], object] = lambda _: None) -> nn.Module:
    model = nn.Module()
    model.layer = Linear()
    change(model.layer)
    return model


def differ(one: nn.Module, other: nn.Module) -> str:
    """How the weight sets differ; empty if one can be filled from the other."""
    mine, theirs = describe(processed_tensors(one)).layout, describe(processed_tensors(other)).layout
    return "" if mine.fingerprint == theirs.fingerprint else "; ".join(differences(mine, theirs))


def keep_in_a_closure(layer: Any) -> None:
    packed = layer.weight.detach().t().contiguous()
    layer.run = lambda x: x @ packed


def keep_in_a_partial(layer: Any) -> None:
    layer.run = functools.partial(torch.add, layer.weight.detach().clone())


def keep_in_a_default(layer: Any) -> None:
    packed = layer.weight.detach().clone()

    def run(x: torch.Tensor, kept: torch.Tensor = packed) -> torch.Tensor:
        return x @ kept

    layer.run = run


def keep_deep(layer: Any) -> None:
    layer.run = {"a": [({"b": layer.weight.detach().clone()},)]}


@pytest.mark.parametrize("keep", [keep_in_a_closure, keep_in_a_partial, keep_in_a_default, keep_deep])
def test_a_packed_copy_is_part_of_the_weight_set_wherever_it_is_kept(keep: Callable[[Any], None]) -> None:
    plain, packed = processed_tensors(made()), processed_tensors(made(keep))
    (name,) = [name for name, tensor in packed.items() if name.startswith("layer.run") and tensor.numel()]
    assert name not in plain
    assert packed[name].shape == (4, 4)


def test_a_tensor_in_a_slot_is_part_of_the_weight_set() -> None:
    assert processed_tensors(made())["layer.kernel.table"].shape == (3,)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda layer: setattr(layer.kernel, "scale", 2.0), "layer.kernel.state-"),
        (lambda layer: setattr(layer, "is_packed", True), "layer.state-"),
        (lambda layer: setattr(layer, "run", functools.partial(torch.add, 3)), "layer.run"),
    ],
    ids=["in a slot", "flag", "in a partial"],
)
def test_other_state_is_another_layout_that_names_the_object(change: Callable[[Any], object], named: str) -> None:
    assert named in differ(made(), made(change))
    assert differ(made(change), made(change)) == ""


def test_the_index_of_a_device_is_no_state() -> None:
    assert differ(made(), made(lambda layer: setattr(layer, "where", torch.device("cuda:1")))) == ""
    assert differ(made(), made(lambda layer: setattr(layer, "where", torch.device("cpu")))) != ""


class OnAnotherDevice(torch.Tensor):
    """A tensor that says it is not where the weights are."""

    device: Any = property(lambda self: torch.device("cuda", 0))


def test_a_tensor_on_another_device_than_the_weights_is_compared() -> None:
    def keep(value: float) -> Callable[[Any], None]:
        kept = torch.full((2,), value).as_subclass(OnAnotherDevice)
        return lambda layer: setattr(layer, "scales", kept)

    assert "layer.state-" in differ(made(keep(1.0)), made(keep(2.0)))
    assert differ(made(keep(1.0)), made(keep(1.0))) == ""
    assert "layer.scales" not in processed_tensors(made(keep(1.0)))


def test_a_model_whose_tensors_are_all_plain_attributes_has_a_weight_set() -> None:
    def keep(layer: Any) -> None:
        layer.experts = [layer.weight.detach().clone() for _ in range(2)]
        del layer.weight

    found = processed_tensors(made(keep))
    assert {"layer.experts.0", "layer.experts.1"} <= set(found)
