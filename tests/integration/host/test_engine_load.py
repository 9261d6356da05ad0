"""Engines that rewrite their weights after loading share what their loader left: each does its own post-processing."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from support.broker_process import BrokerProcess
from weight_broker import WeightSetKey
from weight_broker.integrations.engine import published
from weight_broker.integrations.engine.engine import Engine
from weight_broker.integrations.engine.load import Load
from weight_broker.integrations.engine.options import Options

CHECKPOINT = torch.arange(1024 * 64, dtype=torch.float32).reshape(1024, 64)
models: list[nn.Module] = []
"""They live until their test ends, as in an engine."""


class Packing(Engine):
    """An engine whose post-processing packs the weights into an object that no tensor shows."""

    logger = logging.getLogger("weight_broker.packing")
    model = "model"
    platform = "cpu"

    def make_key(self, options: Options) -> WeightSetKey:
        return WeightSetKey("model")

    def ranks(self, key: WeightSetKey) -> None:
        return None

    def load_weights(self, model: nn.Module) -> None:
        model.get_parameter("weight").data.copy_(CHECKPOINT)

    def watch(self, model: nn.Module) -> None:
        pass


@pytest.fixture(autouse=True)
def _end(broker: BrokerProcess) -> Iterator[None]:
    yield
    published.retract()
    models.clear()


def empty_model() -> nn.Module:
    model = nn.Module()
    model.register_parameter("weight", nn.Parameter(torch.zeros_like(CHECKPOINT), requires_grad=False))
    models.append(model)
    return model


def pack(model: nn.Module) -> torch.Tensor:
    """What the model computes with; its parameter is empty then."""
    weight = model.get_parameter("weight")
    packed = weight.data.t().contiguous()
    weight.data = torch.empty(0)
    return packed


def begun(broker: BrokerProcess, **options: object) -> tuple[Load, nn.Module]:
    """A load whose model has its weights and awaits post-processing."""
    chosen = Options(runtime_directory=str(broker.runtime_directory), **options)  # type: ignore[arg-type]
    load, model = Load(chosen, Packing()), empty_model()
    load.prepare()
    load.weights(model)
    return load, model


@pytest.mark.parametrize("zero_copy", [False, True])
def test_weights_that_post_processing_packs_are_shared(broker: BrokerProcess, zero_copy: bool) -> None:
    for source in ("disk", "peer"):
        load, model = begun(broker, zero_copy=zero_copy)
        assert torch.equal(pack(model), CHECKPOINT.t())
        load.finish(model)
        assert (load.report.source, load.report.not_published) == (source, "")
    assert len(broker.publications()) == 2


def test_weights_are_there_for_others_while_their_engine_post_processes(broker: BrokerProcess) -> None:
    first, model = begun(broker)
    second, other = begun(broker)
    assert second.report.source == "peer"
    second.finish(other)
    first.finish(model)
    assert len(broker.publications()) == 2


def test_an_engine_that_fails_in_post_processing_leaves_no_publication(broker: BrokerProcess) -> None:
    load, _ = begun(broker)
    assert len(broker.publications()) == 1
    load.abandon(RuntimeError("no kernel"))
    assert broker.publications() == []


def test_a_sleep_leaves_the_copy_published(broker: BrokerProcess) -> None:
    load, model = begun(broker)
    load.finish(model)
    assert published.retract("the engine goes to sleep", for_sleep=True) == 0
    pack(model)
    assert published.republish() == 0
    third, filled = begun(broker)
    assert third.report.source == "peer"
    assert torch.equal(filled.get_parameter("weight"), CHECKPOINT)
    third.finish(filled)


def test_a_change_of_the_weights_retracts_the_copy(broker: BrokerProcess) -> None:
    load, model = begun(broker)
    load.finish(model)
    assert published.retract("the weights change", model=model) == 1
    assert broker.publications() == []


def test_the_report_says_what_the_start_was_spent_on(broker: BrokerProcess) -> None:
    load, model = begun(broker)
    load.finish(model)
    engines, own = {"make", "post_process"}, {"key", "acquire", "load", "publish"}
    assert set(load.report.seconds) - {"process"} == engines | own
    assert min(load.report.seconds.values()) >= 0
    assert "post_process" in load.report.summary()


def test_a_load_in_the_engines_own_way_is_its_load(broker: BrokerProcess) -> None:
    load = Load(Options(runtime_directory=str(broker.runtime_directory)), Packing())
    load.without_broker("its load format creates models differently")
    load.finish(empty_model())
    assert set(load.report.seconds) == {"load"}
