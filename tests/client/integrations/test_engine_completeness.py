"""May these weights be published? Shown on plain modules; tests/e2e/vllm shows it on vLLM."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from weight_broker import BrokerError
from weight_broker.drivers.cuda import CudaUnavailable
from weight_broker.integrations.engine.completeness import refusal, snapshot, state_refusal
from weight_broker.integrations.engine.tensors import other_state, weight_tensors


class Layer(nn.Module):
    """A layer with a parameter, a tied one, a buffer that is not persistent and a tensor that nobody registered."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(12.0).reshape(3, 4), requires_grad=False)
        self.tied = self.weight
        self.register_buffer("scale", torch.ones(2), persistent=False)
        self.hidden = torch.zeros(3)
        self.view = self.weight[0]
        self.is_ready = False
        self.empty = nn.Parameter(torch.empty(0), requires_grad=False)

    @functools.cached_property
    def is_padded(self) -> bool:
        """Computed when it is first asked for."""
        return self.weight.shape[1] % 8 != 0


def move(layer: Layer) -> None:
    layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)


def transpose(layer: Layer) -> None:
    layer.weight.data = layer.weight.data.t()


def hide(layer: Layer) -> None:
    packed = layer.weight.data.clone()
    layer.weight.data = torch.empty(0)
    layer.tied = nn.Parameter(torch.empty(0), requires_grad=False)
    layer.pack = lambda: packed  # type: ignore[assignment]


def rewrite(layer: Layer) -> None:
    layer.weight.data.mul_(2)


def shuffle(layer: Layer) -> None:
    layer.weight.data.copy_(layer.weight.data.flip(0))


def rescale(layer: Layer) -> None:
    weight_tensors(layer)["scale"].mul_(3)


@pytest.mark.parametrize(
    ("process", "why"),
    [
        (move, "moved or replaced"),
        (transpose, "moved or replaced 2 of 3 tensors"),
        (hide, "48 of 56 bytes are in no tensor"),
        (rewrite, "rewrote 1 tensors where they are"),
        (shuffle, "rewrote"),
        (rescale, "rewrote 1 tensors where they are (scale)"),
    ],
)
def test_what_post_processing_does_is_seen(process: Callable[[Layer], None], why: str) -> None:
    layer = Layer()
    before = snapshot(weight_tensors(layer), contents=True)
    process(layer)
    kept = {name: tensor for name, tensor in weight_tensors(layer).items() if name in before.places}
    assert why in refusal(before, snapshot(kept, contents=len(kept) == len(before.places)))


def test_post_processing_that_adds_and_leaves_the_rest_alone_is_no_reason() -> None:
    layer = Layer()
    before = snapshot(weight_tensors(layer), contents=True)
    layer.register_buffer("transposed", layer.weight.data.t().contiguous())
    kept = {name: tensor for name, tensor in weight_tensors(layer).items() if name in before.places}
    assert refusal(before, snapshot(kept, contents=True)) == ""


def test_the_weight_set_is_parameters_and_buffers_under_every_name() -> None:
    assert sorted(weight_tensors(Layer())) == ["scale", "tied", "weight"]


@pytest.mark.parametrize(
    ("load", "what"),
    [
        (lambda layer: setattr(layer, "is_ready", True), "is_ready: False -> True"),
        (lambda layer: layer.hidden.fill_(1), "hidden"),
        (lambda layer: setattr(layer, "extra", torch.ones(2)), "extra: absent"),
    ],
    ids=["flag", "hidden tensor", "new tensor"],
)
def test_what_loading_leaves_besides_weights_is_a_reason(load: Callable[[Layer], object], what: str) -> None:
    layer = Layer()
    before = other_state(layer)
    load(layer)
    assert what in state_refusal(before, other_state(layer))


def test_another_view_of_a_weight_may_change_with_it() -> None:
    layer = Layer()
    before = other_state(layer)
    layer.weight.data.fill_(5)
    assert state_refusal(before, other_state(layer)) == ""


def test_what_a_property_remembers_is_no_reason() -> None:
    layer = Layer()
    before = other_state(layer)
    assert layer.is_padded
    assert "is_padded" in vars(layer)
    assert state_refusal(before, other_state(layer)) == ""


class GpuTensor(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device: Any = property(lambda self: torch.device("cuda", 0))


def test_the_content_of_a_gpu_is_not_digested_with_another_vendors_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise CudaUnavailable("libcuda.so.1", 0, "not here")

    monkeypatch.setattr("weight_broker.drivers.cuda.load", missing)
    with pytest.raises(BrokerError, match=r"libcuda\.so\.1"):
        snapshot({"w": torch.zeros(4).as_subclass(GpuTensor)}, contents=True)
