"""A cold-load lease is settled once: by a publication, by giving it up, or by leaving its block."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from support.scripted_broker import Context, ScriptedBroker
from weight_broker import AcquireTimeout, BrokerClient, ColdLoadLease, WeightSetKey
from weight_broker.v1 import resources_pb2
from weight_broker.v1 import weight_broker_service_pb2 as pb

KEY = WeightSetKey("model")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[ScriptedBroker]:
    started = ScriptedBroker(tmp_path).start()
    yield started
    started.stop()


@pytest.fixture
def client(broker: ScriptedBroker) -> Iterator[BrokerClient]:
    with BrokerClient(broker.directory) as created:
        yield created


def tensors() -> dict[str, object]:
    return {"weight": np.ones(10, np.float32)}


@pytest.fixture
def lease(broker: ScriptedBroker, client: BrokerClient) -> ColdLoadLease:
    def play(request: pb.AcquireRequest, context: Context) -> Iterator[pb.AcquireResponse]:
        granted = resources_pb2.ColdLoadLease(weight_set_id=KEY.id, fencing_token=9)
        yield pb.AcquireResponse(cold_load=pb.ColdLoad(cold_load_lease=granted))

    broker.on_acquire = play
    told = client.acquire_or_lease(KEY, tensors())
    assert isinstance(told, ColdLoadLease)
    return told


def test_a_block_that_publishes_nothing_gives_the_lease_up(broker: ScriptedBroker, lease: ColdLoadLease) -> None:
    with lease:
        pass
    report = broker.load_reports.get(timeout=60)
    assert (report.fencing_token, report.give_up.reason) == (9, "nothing was published")


def test_a_block_that_raises_gives_the_lease_up(broker: ScriptedBroker, lease: ColdLoadLease) -> None:
    with pytest.raises(OSError, match="disk"), lease:
        raise OSError("disk")
    assert "OSError" in broker.load_reports.get(timeout=60).give_up.reason


def test_a_block_that_publishes_with_it_keeps_quiet(
    broker: ScriptedBroker, client: BrokerClient, lease: ColdLoadLease
) -> None:
    with lease:
        client.publish(KEY, tensors(), lease=lease)
    assert broker.publish_requests.get(timeout=60).fencing_token == 9
    assert broker.load_reports.empty()


def test_what_was_given_up_is_not_given_up_again(broker: ScriptedBroker, lease: ColdLoadLease) -> None:
    with lease:
        lease.give_up("no room")
    assert broker.load_reports.get(timeout=60).give_up.reason == "no room"
    assert broker.load_reports.empty()


@pytest.mark.parametrize(("holder", "own"), [("instance-1", True), ("instance-2", False)])
def test_who_waits_for_a_lease_of_its_own_is_told_so(
    broker: ScriptedBroker, client: BrokerClient, holder: str, own: bool
) -> None:
    def play(request: pb.AcquireRequest, context: Context) -> Iterator[pb.AcquireResponse]:
        held = resources_pb2.ColdLoadLease(weight_set_id=KEY.id, instance_id=holder)
        yield pb.AcquireResponse(waiting=pb.Waiting(reason=pb.Waiting.REASON_COLD_LOAD, cold_load_lease=held))
        broker.acquire_ended.wait(60)

    broker.on_acquire = play
    with pytest.raises(AcquireTimeout) as caught:
        client.acquire(KEY, tensors(), timeout=0.5)
    assert ("this very process" in str(caught.value)) == own


def test_a_lease_whose_call_did_not_end_well_is_given_up(broker: ScriptedBroker, client: BrokerClient) -> None:
    def play(request: pb.AcquireRequest, context: Context) -> Iterator[pb.AcquireResponse]:
        granted = resources_pb2.ColdLoadLease(weight_set_id=KEY.id, fencing_token=9)
        yield pb.AcquireResponse(cold_load=pb.ColdLoad(cold_load_lease=granted))
        broker.acquire_ended.wait(60)

    broker.on_acquire = play
    with pytest.raises(AcquireTimeout):
        client.acquire_or_lease(KEY, tensors(), timeout=0.5)
    assert broker.load_reports.get(timeout=60).fencing_token == 9
