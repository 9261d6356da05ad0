"""An engine has what was read: views of weights see them, and what the disk did not give is not published."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from support.broker_process import BrokerProcess
from weight_broker import WeightSetKey
from weight_broker.integrations.engine import published
from weight_broker.integrations.engine.engine import Engine
from weight_broker.integrations.engine.load import Load
from weight_broker.integrations.engine.options import Options
from weight_broker.integrations.engine.report import EngineLoad

KEY = WeightSetKey("model", dtype="float32")


@pytest.fixture(autouse=True)
def nothing_stays_published() -> Iterator[None]:
    """A published model keeps its client, for as long as the process runs."""
    yield
    clients = {entry.client for entry in published._published}
    published.retract()
    for client in clients:
        client.close()


class Small(Engine):
    """An engine with a model of a few layers."""

    logger = logging.getLogger("weight_broker.small")
    model = "model"

    def __init__(self, read: Callable[[nn.Module], object]) -> None:
        super().__init__()
        self.read = read

    def make_key(self, options: Options) -> WeightSetKey:
        return KEY

    def ranks(self, key: WeightSetKey) -> None:
        return None

    def load_weights(self, model: nn.Module) -> None:
        self.read(model)

    def watch(self, model: nn.Module) -> None:
        pass


class Model(nn.Module):
    """A model that keeps a view of a weight, as packed and transposed layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4).requires_grad_(False)
        self.spare = nn.Parameter(torch.zeros(3, 3), requires_grad=False)
        self.transposed = [self.layer.weight.t()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.transposed[0] + self.layer.bias


def read_all(model: nn.Module) -> None:
    """Through `data`, as engines do: torch counts no version then."""
    torch.manual_seed(7)
    for parameter in model.parameters():
        parameter.data.copy_(torch.rand(parameter.shape))


def read_layer(model: nn.Module) -> None:
    """`spare` stays as it was made."""
    read_all(model.get_submodule("layer"))


def load(broker: BrokerProcess, model: nn.Module, read: Callable[[nn.Module], object], **options: bool) -> EngineLoad:
    loading = Load(Options(runtime_directory=str(broker.runtime_directory), **options), Small(read))  # type: ignore[arg-type]
    loading.prepare()
    loading.weights(model)
    loading.finish(model)
    return loading.report


@pytest.mark.parametrize("zero_copy", [False, True])
def test_views_see_the_weights_however_they_came(broker: BrokerProcess, zero_copy: bool) -> None:
    first, second = Model(), Model()
    assert load(broker, first, read_all).publication_id
    report = load(broker, second, lambda model: pytest.fail("the disk was read"), zero_copy=zero_copy)
    assert report.source == "peer"
    assert torch.equal(second(torch.eye(4)), first(torch.eye(4)))


def test_a_model_without_views_is_mapped(broker: BrokerProcess) -> None:
    first, second = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4).requires_grad_(False)
    assert load(broker, first, read_all).publication_id
    before = second.weight.data_ptr()
    assert load(broker, second, read_all, zero_copy=True).source == "peer"
    assert second.weight.data_ptr() != before
    assert torch.equal(second.weight, first.weight)


def test_a_parameter_that_the_disk_did_not_give_is_named_and_nothing_is_published(broker: BrokerProcess) -> None:
    model = Model()
    nn.init.normal_(model.spare)
    report = load(broker, model, read_layer)
    assert not report.publication_id
    assert "the load did not write 1 parameters (spare)" in report.not_published


def test_a_parameter_that_is_declared_and_not_used_keeps_its_zeros(broker: BrokerProcess) -> None:
    assert load(broker, Model(), read_layer).publication_id
