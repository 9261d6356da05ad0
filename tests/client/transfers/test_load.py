"""`acquire_or_load` loads, whatever happens to the broker, and never lets others wait for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from support.scripted_broker import Context, ScriptedBroker, done, fail, granted
from weight_broker import BrokerClient, BrokerError, Reason, WeightSetKey
from weight_broker.memory import describe, export
from weight_broker.v1 import resources_pb2
from weight_broker.v1 import weight_broker_service_pb2 as pb

KEY = WeightSetKey("model")


class Model:
    """Weights, and a loader that counts."""

    def __init__(self) -> None:
        self.weights: dict[str, npt.NDArray[Any]] = {"w": np.zeros(1000, np.float32)}
        self.loads = 0

    def load(self) -> None:
        self.loads += 1
        self.weights["w"].fill(4)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[ScriptedBroker]:
    scripted = ScriptedBroker(tmp_path).start()
    yield scripted
    scripted.stop()


@pytest.fixture
def client(broker: ScriptedBroker) -> Iterator[BrokerClient]:
    with BrokerClient(broker.directory) as created:
        yield created


def grant_lease(broker: ScriptedBroker) -> None:
    lease = resources_pb2.ColdLoadLease(weight_set_id=KEY.id, fencing_token=9)

    def play(request: pb.AcquireRequest, context: Context) -> Iterator[pb.AcquireResponse]:
        assert request.if_absent == pb.IF_ABSENT_LOAD
        yield pb.AcquireResponse(cold_load=pb.ColdLoad(cold_load_lease=lease))

    broker.on_acquire = play


def refuse(broker: ScriptedBroker, reason: Reason) -> None:
    def play(request: pb.AcquireRequest, context: Context) -> Iterator[pb.AcquireResponse]:
        fail(context, reason)
        yield

    broker.on_acquire = play


def test_the_holder_of_the_lease_loads_and_publishes_with_it(broker: ScriptedBroker, client: BrokerClient) -> None:
    grant_lease(broker)
    model = Model()
    report = client.acquire_or_load(KEY, model.weights, model.load)
    assert (report.source, model.loads, report.publish_error, report.acquire_error) == ("disk", 1, None, None)
    assert report.publication is not None
    assert broker.publish_requests.get(timeout=60).fencing_token == 9
    assert report.seconds >= report.acquire_seconds + report.load_seconds + report.publish_seconds - 0.001


def test_what_is_published_is_what_is_there_after_the_load(broker: ScriptedBroker, client: BrokerClient) -> None:
    grant_lease(broker)
    model = Model()

    def load() -> None:
        model.weights = {"w": np.ones((3, 4), np.float64)}

    client.acquire_or_load(KEY, lambda: model.weights, load)
    assert list(broker.publish_requests.get(timeout=60).layout.tensors[0].shape) == [3, 4]


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()])
def test_a_loader_that_raises_gives_the_lease_up_and_its_exception_is_unchanged(
    broker: ScriptedBroker, client: BrokerClient, error: BaseException
) -> None:
    grant_lease(broker)

    def load() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        client.acquire_or_load(KEY, Model().weights, load)
    assert caught.value is error
    report = broker.load_reports.get(timeout=60)
    assert (report.fencing_token, report.WhichOneof("action")) == (9, "give_up")
    assert type(error).__name__ in report.give_up.reason


def test_a_failed_publication_is_told_not_raised_and_the_lease_is_given_up(
    broker: ScriptedBroker, client: BrokerClient, caplog: pytest.LogCaptureFixture
) -> None:
    grant_lease(broker)
    broker.refusals["Publish"] = [Reason.LIMIT_EXCEEDED]
    model = Model()
    report = client.acquire_or_load(KEY, model.weights, model.load)
    assert (report.source, report.publication) == ("disk", None)
    assert report.publish_error is not None
    assert "PublishRefused" in report.publish_error
    assert "not published" in caplog.text
    assert broker.load_reports.get(timeout=60).WhichOneof("action") == "give_up"


@pytest.mark.parametrize(
    "reason",
    [Reason.INTEGRITY_ERROR, Reason.TRANSFER_FAILED, Reason.INTERNAL, Reason.LAYOUT_MISMATCH, Reason.ACQUIRE_TIMEOUT],
)
def test_any_failure_of_the_broker_leads_to_the_disk_and_then_to_a_new_source(
    broker: ScriptedBroker, client: BrokerClient, caplog: pytest.LogCaptureFixture, reason: Reason
) -> None:
    refuse(broker, reason)
    model = Model()
    report = client.acquire_or_load(KEY, model.weights, model.load)
    assert (report.source, model.loads) == ("disk", 1)
    assert report.acquire_error is not None
    assert report.publication is not None
    assert broker.publish_requests.get(timeout=60).fencing_token == 0
    assert "from disk" in caplog.text
    assert ("another layout" in caplog.text) == (reason is Reason.LAYOUT_MISMATCH)


def test_a_draining_broker_gets_no_publication(broker: ScriptedBroker, client: BrokerClient) -> None:
    refuse(broker, Reason.DRAINING)
    model = Model()
    report = client.acquire_or_load(KEY, model.weights, model.load)
    assert (report.source, report.publication, report.publish_error) == ("disk", None, None)
    assert broker.publish_requests.empty()


def test_memory_that_may_still_be_written_to_is_not_loaded_into(
    client: BrokerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(*args: object, **kwargs: object) -> None:
        raise BrokerError("unknown", touched=True, quiesced=False)

    monkeypatch.setattr(client._exchange, "fill", poisoned)
    model = Model()
    with pytest.raises(BrokerError) as caught:
        client.acquire_or_load(KEY, model.weights, model.load)
    assert not caught.value.quiesced
    assert model.loads == 0


def test_who_does_not_publish_takes_no_lease(broker: ScriptedBroker, client: BrokerClient) -> None:
    seen: list[int] = []

    def play(request: pb.AcquireRequest, context: Context) -> Iterator[pb.AcquireResponse]:
        seen.append(request.if_absent)
        fail(context, Reason.WEIGHTS_NOT_FOUND)
        yield

    broker.on_acquire = play
    model = Model()
    report = client.acquire_or_load(KEY, model.weights, model.load, publish=False)
    assert (report.source, seen) == ("disk", [pb.IF_ABSENT_WAIT])
    assert broker.publish_requests.empty()


@pytest.mark.parametrize("publish_fails", [False, True])
def test_who_is_filled_becomes_a_source_of_the_same_memory_without_a_copy(
    broker: ScriptedBroker, client: BrokerClient, publish_fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = describe({"w": np.full(1000, 6, np.float32)})
    region = export(described)
    broker.regions["transfer-1", 0] = region.fd

    def play(request: pb.AcquireRequest, context: Context) -> Iterator[pb.AcquireResponse]:
        yield granted("transfer-1", described, region)
        broker.transfer_reports.get(timeout=60)
        yield done("transfer-1", 4000)

    broker.on_acquire = play
    if publish_fails:
        broker.refusals["Publish"] = [Reason.LIMIT_EXCEEDED]
    monkeypatch.setattr("weight_broker.memory.host.export.export", None)  # a copy would fail
    model = Model()
    report = client.acquire_or_load(KEY, model.weights, model.load)
    region.close()
    assert (report.source, model.loads) == ("peer", 0)
    assert (model.weights["w"] == 6).all()
    assert (report.publication is None) == publish_fails
    assert (report.publish_error is not None) == publish_fails
    if not publish_fails:
        request = broker.publish_requests.get(timeout=60)
        assert [(one.region_index, one.offset_bytes) for one in request.placements] == list(region.placements)
        assert [tuple(digests.values) for digests in request.digests] == [one.values for one in region.digests]


@pytest.mark.parametrize(
    "error", [OSError(24, "Too many open files"), MemoryError(), RuntimeError("can't start new thread")]
)
def test_a_process_without_descriptors_memory_or_threads_for_the_broker_loads_from_disk(
    client: BrokerClient, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail_here(*arguments: object, **keywords: object) -> object:
        raise error

    monkeypatch.setattr(client._exchange, "fill", fail_here)
    model = Model()
    report = client.acquire_or_load(KEY, model.weights, model.load, timeout=5)
    assert (report.source, model.loads) == ("disk", 1)
    assert report.acquire_error is not None
    assert report.acquire_error.startswith(type(error).__name__)
