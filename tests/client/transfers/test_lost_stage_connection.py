"""A stage connection that ends before the broker looks for it costs a call one repetition, and its caller nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.device_driver import PAGE_BYTES, Acl, Memory
from support.scripted_broker import Context, ScriptedBroker, done, refused
from support.waiting import eventually
from weight_broker import BrokerClient, BrokerUnavailable, Reason, WeightSetKey
from weight_broker.drivers import acl as acl_module
from weight_broker.errors import NotAttached
from weight_broker.memory import describe
from weight_broker.memory.kind import kind_of
from weight_broker.memory.npu import export as npu_export
from weight_broker.memory.npu.registry import Exports
from weight_broker.v1 import attach_pb2, resources_pb2
from weight_broker.v1 import weight_broker_service_pb2 as pb
from weight_broker.wire import digests_to_wire

KEY = WeightSetKey("model")
Call = Callable[[BrokerClient, Memory], Any]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Acl:
    acl = Acl()
    monkeypatch.setattr(acl_module, "load", lambda *_: acl)
    monkeypatch.setattr(npu_export, "EXPORTS", Exports())
    return acl


@pytest.fixture
def broker(tmp_path: Path, driver: Acl) -> Iterator[ScriptedBroker]:
    scripted = ScriptedBroker(tmp_path).start()
    scripted.on_acquire = fill
    yield scripted
    scripted.stop()


@pytest.fixture
def client(broker: ScriptedBroker) -> Iterator[BrokerClient]:
    with BrokerClient(broker.directory, device_path="staged") as created:
        yield created


def fill(request: pb.AcquireRequest, context: Context) -> Iterator[pb.AcquireResponse]:
    """The bytes are what they were."""
    digests = kind_of("npu").digests(describe({"w": Memory(5).tensor()}))
    path = resources_pb2.TRANSFER_PATH_STAGED
    yield pb.AcquireResponse(
        granted=pb.Granted(transfer_id="transfer-1", path=path, digests=[digests_to_wire(digests)])
    )
    yield pb.AcquireResponse(moved=pb.Moved(size_bytes=PAGE_BYTES))
    yield done("transfer-1", PAGE_BYTES)


def acquire(client: BrokerClient, memory: Memory) -> Any:
    return client.acquire(KEY, {"w": memory.tensor()})


def publish(client: BrokerClient, memory: Memory) -> Any:
    return client.publish(KEY, {"w": memory.tensor()})


CALLS = pytest.mark.parametrize(("method", "call"), [("Acquire", acquire), ("Publish", publish)])


def attach_requests(broker: ScriptedBroker) -> list[str]:
    found = []
    while not broker.attach_requests.empty():
        found.append(broker.attach_requests.get())
    return [request for request in found if request != "end"]


@CALLS
def test_the_call_is_repeated_on_another_stage_connection_of_the_same_session(
    broker: ScriptedBroker, client: BrokerClient, monkeypatch: pytest.MonkeyPatch, method: str, call: Call
) -> None:
    """The session has publications and leases, which are not at stake."""
    refuse = broker._check

    def lose_the_connection_first(called: str, context: Context) -> None:
        if called == method and broker.refusals.get(method):
            broker.drop_stage_connections()
        refuse(called, context)

    monkeypatch.setattr(broker, "_check", lose_the_connection_first)
    broker.refusals[method] = [NotAttached.without_stage()]
    outcome = call(client, Memory(5))
    assert outcome is not None
    assert attach_requests(broker) == ["hello", "serve_stage", "serve_stage"]


@CALLS
def test_a_stage_connection_that_the_broker_refuses_for_once_does_not_cost_the_session(
    broker: ScriptedBroker, client: BrokerClient, method: str, call: Call
) -> None:
    """The broker has no descriptor left at that moment, for example."""
    refusals = [refused(Reason.NOT_ATTACHED, "this process cannot be watched")]

    def refuse_once(request: attach_pb2.AttachRequest) -> attach_pb2.AttachResponse | None:
        return refusals.pop() if request.HasField("serve_stage") and refusals else None

    broker.on_attach = refuse_once
    assert call(client, Memory(5)) is not None
    assert attach_requests(broker) == ["hello", "serve_stage", "serve_stage"]


@CALLS
def test_a_connection_that_is_lost_again_and_again_is_an_unavailable_broker(
    broker: ScriptedBroker, client: BrokerClient, method: str, call: Call
) -> None:
    broker.refusals[method] = [NotAttached.without_stage() for _ in range(3)]
    with pytest.raises(BrokerUnavailable, match="no stage connection") as caught:
        call(client, Memory(5))
    assert (caught.value.touched, caught.value.quiesced) == (False, True)
    assert caught.value.reason is Reason.BROKER_UNAVAILABLE
    assert len(broker.refusals[method]) == 1


def test_a_publication_whose_stage_connection_is_lost_is_published_again_although_that_is_lost_too(
    broker: ScriptedBroker, client: BrokerClient, caplog: pytest.LogCaptureFixture
) -> None:
    publication = publish(client, Memory(5))
    broker.refusals["Publish"] = [NotAttached.without_stage()]
    broker.drop_stage_connections()
    eventually(lambda: publication.id == "publication-2")
    assert broker.retractions.get(timeout=60) == "publication-1", "if the broker had noticed nothing, there were two"
    assert "cannot be published now" not in caplog.text
    assert "goodbye" not in attach_requests(broker)


def test_another_call_that_opens_the_connection_again_does_not_hide_that_a_publication_was_lost(
    broker: ScriptedBroker, client: BrokerClient
) -> None:
    publication = publish(client, Memory(5))
    broker.drop_stage_connections()
    acquire(client, Memory(5))
    eventually(lambda: publication.id == "publication-2")
