"""The attach connection keeps questions and answers together, whatever goes wrong between them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.scripted_broker import TOKEN, ScriptedBroker, refused
from weight_broker.attach import AttachConnection
from weight_broker.errors import BrokerError, BrokerUnavailable, NotAttached, PublishRefused, Reason
from weight_broker.v1 import attach_pb2


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[ScriptedBroker]:
    scripted = ScriptedBroker(tmp_path).start()
    yield scripted
    scripted.stop()


@pytest.fixture
def connection(broker: ScriptedBroker) -> Iterator[AttachConnection]:
    connected = AttachConnection(broker.directory / "attach.sock", "name")
    assert connected.connect().session_token == TOKEN
    yield connected
    connected.close()


def test_a_refusal_becomes_the_exception_of_its_reason(broker: ScriptedBroker, connection: AttachConnection) -> None:
    broker.on_attach = lambda request: refused(Reason.REGION_REFUSED, "not sealed")
    with pytest.raises(PublishRefused, match="not sealed") as caught:
        connection.offer_region("region", 0, 1)
    assert caught.value.reason is Reason.REGION_REFUSED


def test_a_reason_of_a_newer_broker_becomes_a_plain_error(broker: ScriptedBroker, connection: AttachConnection) -> None:
    broker.on_attach = lambda request: refused("NEW_REASON", "what is new")
    with pytest.raises(BrokerError, match="NEW_REASON: what is new"):
        connection.withdraw_region("region")


def test_a_claimed_descriptor_is_the_callers_and_is_not_inherited(
    broker: ScriptedBroker, connection: AttachConnection
) -> None:
    descriptor = os.memfd_create("region")
    os.write(descriptor, b"content")
    broker.regions["transfer", 1] = descriptor
    claimed = connection.claim_region("transfer", 1)
    assert os.pread(claimed, 7, 0) == b"content"
    assert not os.get_inheritable(claimed)
    os.close(claimed)
    os.close(descriptor)


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next_one(
    broker: ScriptedBroker, connection: AttachConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(request: attach_pb2.AttachRequest) -> None:
        if request.WhichOneof("request") == "claim_region":
            time.sleep(0.3)

    region = os.memfd_create("region")
    broker.regions["transfer", 0] = region
    broker.on_attach = late
    before = len(os.listdir("/proc/self/fd"))
    request = attach_pb2.AttachRequest(claim_region=attach_pb2.ClaimRegion(transfer_id="transfer"))
    with pytest.raises(BrokerUnavailable, match="within"):
        connection._ask(request, timeout=0.05)
    broker.on_attach = lambda request: refused(Reason.REGION_REFUSED, "the second answer")
    with pytest.raises(PublishRefused, match="the second answer"):
        connection.withdraw_region("region")
    assert len(os.listdir("/proc/self/fd")) == before  # the late answer's descriptor is closed
    os.close(region)


def test_a_connection_that_the_broker_closed_is_over(broker: ScriptedBroker, connection: AttachConnection) -> None:
    assert not connection.is_over()
    broker.drop_attachments()
    assert connection.is_over()
    with pytest.raises(NotAttached):
        connection.withdraw_region("region")


def test_a_forked_child_lets_go_without_a_word(broker: ScriptedBroker, connection: AttachConnection) -> None:
    child = os.fork()
    if child == 0:
        connection.forget()
        os._exit(0 if connection.is_over() else 1)
    assert os.waitpid(child, 0)[1] == 0
    connection.withdraw_region("region")
    requests = [broker.attach_requests.get(timeout=5) for _ in range(2)]
    assert requests == ["hello", "withdraw_region"]


def test_leaving_says_goodbye(broker: ScriptedBroker, connection: AttachConnection) -> None:
    connection.leave()
    assert [broker.attach_requests.get(timeout=5) for _ in range(3)] == ["hello", "goodbye", "end"]
    connection.leave()
    with pytest.raises(NotAttached):
        connection.goodbye()
