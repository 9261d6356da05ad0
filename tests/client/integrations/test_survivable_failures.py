"""What goes wrong with the broker, or with this process while it speaks to it, fails no load: neither the client's own,
nor an engine's, nor that of transformers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from support.models import write_model
from support.scripted_broker import Context, ScriptedBroker
from weight_broker import (
    BrokerClient,
    BrokerError,
    BrokerUnavailable,
    InvalidArgument,
    LayoutMismatch,
    PublishRefused,
    TransferFailed,
    WeightSetKey,
)
from weight_broker.connection.session import Attachment
from weight_broker.drivers.acl import AclUnavailable
from weight_broker.drivers.cuda import CudaError
from weight_broker.integrations.engine.engine import Engine
from weight_broker.integrations.engine.load import Load
from weight_broker.integrations.engine.options import Options
from weight_broker.integrations.transformers import load_causal_lm
from weight_broker.transfers.publication import Publication
from weight_broker.v1 import resources_pb2
from weight_broker.v1 import weight_broker_service_pb2 as pb

KEY = WeightSetKey("model")

FAILURES = [
    BrokerError("a defect of the broker's"),
    BrokerUnavailable("gone"),
    InvalidArgument("tensors", 7, "tensors"),
    LayoutMismatch("another layout"),
    TransferFailed("a source is gone"),
    PublishRefused("too large"),
    AclUnavailable("libascendcl.so", 0, "not here"),
    CudaError("cuInit", 999, "unknown"),
    OSError(24, "Too many open files"),
    MemoryError("no memory"),
    ImportError("libstdc++ cannot be opened"),
    RuntimeError("can't start new thread"),
]


class Outcome(NamedTuple):
    """What a load says of itself."""

    source: str
    is_published: bool
    acquire_error: str
    publish_error: str


class Small(Engine):
    """An engine with a model of one layer."""

    logger = logging.getLogger("weight_broker.small")
    model = "model"

    def make_key(self, options: Options) -> WeightSetKey:
        return KEY

    def ranks(self, key: WeightSetKey) -> None:
        return None

    def load_weights(self, model: nn.Module) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(4)

    def watch(self, model: nn.Module) -> None:
        pass


def by_client(directory: Path) -> Outcome:
    with BrokerClient(directory) as client:
        weight = torch.zeros(8)
        report = client.acquire_or_load(KEY, {"w": weight}, lambda: void(weight.fill_(4)), timeout=10)
        return Outcome(
            report.source, report.publication is not None, report.acquire_error or "", report.publish_error or ""
        )


def void(value: object) -> None:
    """For lambdas that have to return nothing."""


def by_engine(directory: Path) -> Outcome:
    model = nn.Linear(2, 2).requires_grad_(False)
    load = Load(Options(runtime_directory=str(directory), timeout=10), Small())
    load.prepare()
    load.weights(model)
    load.finish(model)
    report = load.report
    assert (model.weight == 4).all()
    return Outcome(report.source, bool(report.publication_id), report.acquire_error, report.not_published)


def by_transformers(directory: Path) -> Outcome:
    with BrokerClient(directory) as client:
        _, report = load_causal_lm(write_model(directory / "model"), client, timeout=10)
        return Outcome(
            report.source, report.publication is not None, report.acquire_error or "", report.publish_error or ""
        )


CALLERS = [by_client, by_engine, by_transformers]


def grant_lease(request: pb.AcquireRequest, context: Context) -> Iterator[pb.AcquireResponse]:
    lease = resources_pb2.ColdLoadLease(weight_set_id=KEY.id, fencing_token=9)
    yield pb.AcquireResponse(cold_load=pb.ColdLoad(cold_load_lease=lease))


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[ScriptedBroker]:
    scripted = ScriptedBroker(tmp_path).start()
    scripted.on_acquire = grant_lease
    yield scripted
    scripted.stop()


@pytest.mark.parametrize("error", FAILURES, ids=repr)
@pytest.mark.parametrize("caller", CALLERS)
def test_whatever_fails_while_the_broker_is_asked_the_weights_come_from_disk(
    broker: ScriptedBroker,
    monkeypatch: pytest.MonkeyPatch,
    caller: Callable[[Path], Outcome],
    error: Exception,
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(Attachment, "run", fail)
    outcome = caller(broker.directory)
    assert (outcome.source, outcome.is_published) == ("disk", False)
    assert outcome.acquire_error.startswith(type(error).__name__)


@pytest.mark.parametrize("error", [*FAILURES, ValueError("a defect"), KeyError("a defect")], ids=repr)
@pytest.mark.parametrize("caller", CALLERS)
def test_whatever_fails_while_they_are_published_the_weights_stay_loaded_and_the_next_one_is_told_to_load(
    broker: ScriptedBroker,
    monkeypatch: pytest.MonkeyPatch,
    caller: Callable[[Path], Outcome],
    error: Exception,
) -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        raise error

    monkeypatch.setattr(Publication, "announce", fail)
    outcome = caller(broker.directory)
    assert (outcome.source, outcome.is_published, outcome.acquire_error) == ("disk", False, "")
    assert outcome.publish_error.startswith(type(error).__name__)
    report = broker.load_reports.get(timeout=5)
    assert (report.fencing_token, report.WhichOneof("action")) == (9, "give_up")
