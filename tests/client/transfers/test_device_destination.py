"""Device memory against a scripted broker: what is asked for and offered, and when it is let go. The driver is an
object."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from support.device_driver import PAGE_BYTES, Acl, Memory
from support.scripted_broker import Context, ScriptedBroker, done
from support.scripted_stage import assert_set
from support.waiting import eventually
from weight_broker import (
    AcquireTimeout,
    BrokerClient,
    BrokerError,
    ColdLoadLease,
    PublishRefused,
    Reason,
    WeightSetKey,
)
from weight_broker.connection.session import Session
from weight_broker.drivers import acl as acl_module
from weight_broker.memory import describe
from weight_broker.memory.device.shared import DeviceShared
from weight_broker.memory.kind import Terms, kind_of
from weight_broker.memory.npu import export as npu_export
from weight_broker.memory.npu.registry import Exports
from weight_broker.v1 import resources_pb2
from weight_broker.v1 import weight_broker_service_pb2 as pb
from weight_broker.wire import digests_to_wire

KEY = WeightSetKey("model")
COPY, STAGED = resources_pb2.TRANSFER_PATH_COPY, resources_pb2.TRANSFER_PATH_STAGED


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Acl:
    acl = Acl()
    monkeypatch.setattr(acl_module, "load", lambda *_: acl)
    monkeypatch.setattr(npu_export, "EXPORTS", Exports())  # what stays mapped is not let go
    return acl


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[ScriptedBroker]:
    scripted = ScriptedBroker(tmp_path).start()
    yield scripted
    scripted.stop()


@pytest.fixture
def client(broker: ScriptedBroker, driver: Acl) -> Iterator[BrokerClient]:
    with BrokerClient(broker.directory) as created:
        yield created


@pytest.fixture
def memory() -> Memory:
    return Memory()


def grant_lease(request: pb.AcquireRequest, context: Context) -> Iterator[pb.AcquireResponse]:
    lease: Any = resources_pb2.ColdLoadLease(weight_set_id=KEY.id, fencing_token=9)
    yield pb.AcquireResponse(cold_load=pb.ColdLoad(cold_load_lease=lease))


def granted(path: resources_pb2.TransferPath.ValueType) -> pb.AcquireResponse:
    digests = kind_of("npu").digests(describe({"w": Memory(5).tensor()}))
    return pb.AcquireResponse(
        granted=pb.Granted(transfer_id="transfer-1", path=path, digests=[digests_to_wire(digests)])
    )


class Script:
    """Grants the paths one after the other, then brings the bytes, or ends as a broker that is gone does."""

    def __init__(self, memory: Memory, *paths: resources_pb2.TransferPath.ValueType, is_lost: bool = False) -> None:
        self.requests: list[pb.AcquireRequest] = []
        self._memory = memory
        self._paths = paths
        self._is_lost = is_lost

    def __call__(self, request: pb.AcquireRequest, context: Context) -> Iterator[pb.AcquireResponse]:
        self.requests.append(request)
        for path in self._paths:
            yield granted(path)
        if self._is_lost:
            context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        self._memory.fill(5)
        yield pb.AcquireResponse(moved=pb.Moved(size_bytes=PAGE_BYTES))
        yield done("transfer-1", PAGE_BYTES)


def stage_ids(client: BrokerClient) -> dict[str, Any]:
    """What the broker can ask this process to copy."""
    return client._attachment.session().staging._staged


def test_a_lease_that_comes_with_memory_that_stays_mapped_is_given_up_before_the_error_is_raised(
    broker: ScriptedBroker, driver: Acl, client: BrokerClient, memory: Memory
) -> None:
    broker.on_acquire = grant_lease
    driver.is_mapped = True
    with pytest.raises(BrokerError) as caught:
        client.acquire_or_lease(KEY, {"w": memory.tensor()})
    assert (caught.value.touched, caught.value.quiesced) == (True, False)
    report = broker.load_reports.get(timeout=5)
    assert (report.fencing_token, report.WhichOneof("action")) == (9, "give_up")


@pytest.mark.parametrize("says_wait", [True, False])
def test_without_a_grant_the_deadline_is_the_callers_although_a_broker_that_writes_gets_longer(
    broker: ScriptedBroker, driver: Acl, client: BrokerClient, memory: Memory, says_wait: bool
) -> None:
    ended, left = threading.Event(), []

    def note(context: Context) -> None:
        left.append(context.time_remaining())
        ended.set()

    def stay_silent(request: pb.AcquireRequest, context: Context) -> Iterator[pb.AcquireResponse]:
        context.add_callback(lambda: note(context))
        if says_wait:
            yield pb.AcquireResponse(waiting=pb.Waiting(reason=pb.Waiting.REASON_COLD_LOAD))
        assert_set(ended)

    broker.on_acquire = stay_silent
    with pytest.raises(AcquireTimeout) as caught:
        client.acquire(KEY, {"w": memory.tensor()}, timeout=2)  # the call arrives before that
    assert (caught.value.touched, caught.value.quiesced) == (False, True)
    assert_set(ended)
    assert left[0] > 0, "the client ended the call, not gRPC's deadline"
    assert not driver.keys


def test_a_lease_comes_with_memory_that_the_broker_has_no_more(
    broker: ScriptedBroker, driver: Acl, client: BrokerClient, memory: Memory
) -> None:
    broker.on_acquire = grant_lease
    lease = client.acquire_or_lease(KEY, {"w": memory.tensor()})
    assert isinstance(lease, ColdLoadLease)
    assert not driver.keys
    assert not stage_ids(client)
    lease.give_up()


@pytest.mark.parametrize(
    ("paths", "how"), [((COPY,), "copy"), ((STAGED,), "staged"), ((COPY, STAGED), "staged")], ids=str
)
def test_the_broker_gets_both_ways_in_one_request_and_picks(
    broker: ScriptedBroker,
    driver: Acl,
    client: BrokerClient,
    memory: Memory,
    paths: tuple[resources_pb2.TransferPath.ValueType, ...],
    how: str,
) -> None:
    script = broker.on_acquire = Script(memory, *paths)
    report = client.acquire(KEY, {"w": memory.tensor()})
    assert report.path == how
    [request] = script.requests
    assert request.path == COPY
    assert [one.size_bytes for one in request.regions] == [PAGE_BYTES]
    assert len(request.placements) == 1
    assert request.stage_id
    assert request.device_id
    assert not driver.keys
    assert not stage_ids(client)


@pytest.mark.parametrize(
    ("device_path", "has_regions", "has_stage_id", "path"),
    [("auto", True, True, COPY), ("direct", True, False, COPY), ("staged", False, True, STAGED)],
)
def test_the_policy_decides_which_ways_are_open(
    broker: ScriptedBroker,
    driver: Acl,
    memory: Memory,
    device_path: str,
    has_regions: bool,
    has_stage_id: bool,
    path: resources_pb2.TransferPath.ValueType,
) -> None:
    script = broker.on_acquire = Script(memory, path)
    with BrokerClient(broker.directory, device_path=device_path) as client:
        client.acquire(KEY, {"w": memory.tensor()})
        client.publish(KEY, {"w": memory.tensor()})
    [request], published = script.requests, broker.publish_requests.get(timeout=5)
    assert (bool(request.regions), bool(request.stage_id), request.path) == (has_regions, has_stage_id, path)
    assert (bool(published.regions), published.HasField("staged")) == (has_regions, has_stage_id)
    assert bool(published.placements) is has_regions
    assert not driver.keys


def test_memory_that_its_driver_does_not_export_is_staged(
    broker: ScriptedBroker, driver: Acl, client: BrokerClient, memory: Memory
) -> None:
    driver.refuses_exports = True
    script = broker.on_acquire = Script(memory, STAGED)
    assert client.acquire(KEY, {"w": memory.tensor()}).path == "staged"
    [request] = script.requests
    assert (request.path, len(request.regions), len(request.placements)) == (STAGED, 0, 0)
    assert request.stage_id
    client.publish(KEY, {"w": memory.tensor()})
    published = broker.publish_requests.get(timeout=5)
    assert published.staged.stage_id
    assert not published.regions


def test_what_is_offered_in_both_ways_stays_so_until_it_is_retracted(
    broker: ScriptedBroker, driver: Acl, client: BrokerClient, memory: Memory
) -> None:
    publication = client.publish(KEY, {"w": memory.tensor()})
    request = broker.publish_requests.get(timeout=5)
    assert list(stage_ids(client)) == [request.staged.stage_id]
    assert len(driver.keys) == len(request.regions) == 1
    publication.retract()
    assert not stage_ids(client)
    assert not driver.keys


def test_what_arrived_staged_can_be_published_and_is_retracted_whole(
    broker: ScriptedBroker, driver: Acl, client: BrokerClient, memory: Memory
) -> None:
    broker.on_acquire = Script(memory, COPY, STAGED)
    report = client.acquire_or_load(KEY, {"w": memory.tensor()}, lambda: None)
    assert report.publication is not None
    assert list(stage_ids(client)) == [broker.publish_requests.get(timeout=5).staged.stage_id]
    report.publication.retract()
    assert not stage_ids(client)
    assert not driver.keys


def test_memory_that_a_lost_broker_may_write_to_is_not_handed_back(
    broker: ScriptedBroker, driver: Acl, client: BrokerClient, memory: Memory
) -> None:
    broker.on_acquire = Script(memory, COPY, is_lost=True)
    with pytest.raises(BrokerError) as caught:
        client.acquire(KEY, {"w": memory.tensor()})
    assert (caught.value.touched, caught.value.quiesced) == (True, False)
    assert driver.keys
    assert not stage_ids(client), "this process itself writes no more"


@pytest.mark.parametrize("paths", [(COPY,), (STAGED, COPY)])
def test_memory_that_a_lost_broker_may_write_to_is_shared_until_the_client_is_closed(
    broker: ScriptedBroker, driver: Acl, memory: Memory, paths: tuple[resources_pb2.TransferPath.ValueType, ...]
) -> None:
    """A chunk that is exported cannot be freed, and an address has one key: a process would lose both for good."""
    broker.on_acquire = Script(memory, *paths, is_lost=True)
    with BrokerClient(broker.directory) as client:
        with pytest.raises(BrokerError, match="gone"):
            client.acquire(KEY, {"w": memory.tensor()})
        assert driver.keys
    assert not driver.keys


def test_memory_that_was_discarded_after_a_lost_transfer_is_not_kept_alive(
    broker: ScriptedBroker, driver: Acl, client: BrokerClient
) -> None:
    memory = Memory()
    broker.on_acquire = Script(Memory(), COPY, is_lost=True)
    with pytest.raises(BrokerError, match="gone"):
        client.acquire(KEY, {"w": memory.tensor()})
    discarded = weakref.ref(memory)
    del memory

    def is_collected() -> bool:
        gc.collect()  # again: the thread of the connection that ended may still hold its frames
        return discarded() is None

    eventually(is_collected)


def test_memory_that_stays_mapped_after_a_transfer_is_let_go_by_the_next_close(
    broker: ScriptedBroker, driver: Acl, memory: Memory
) -> None:
    broker.on_acquire = Script(memory, COPY)
    driver.is_mapped = True
    client = BrokerClient(broker.directory)
    with pytest.raises(BrokerError, match="still mapped"):
        client.acquire(KEY, {"w": memory.tensor()})
    client.close()
    assert driver.keys
    driver.is_mapped = False
    client.close()
    assert not driver.keys


def test_memory_that_stays_mapped_after_a_refused_publication_is_let_go_when_the_client_is_closed(
    broker: ScriptedBroker, driver: Acl, memory: Memory
) -> None:
    client = BrokerClient(broker.directory)
    broker.refusals["Publish"] = [Reason.LIMIT_EXCEEDED]
    driver.is_mapped = True
    with pytest.raises(PublishRefused):
        client.publish(KEY, {"w": memory.tensor()})
    gc.collect()
    assert driver.keys
    driver.is_mapped = False
    client.close()
    assert not driver.keys


def test_what_arrived_and_could_not_be_let_go_ends_when_the_client_is_closed(
    broker: ScriptedBroker, driver: Acl, memory: Memory
) -> None:
    broker.on_acquire = Script(memory, COPY)
    with BrokerClient(broker.directory) as client:
        with client._load(KEY, timeout=60, publish=True) as load:
            assert load.fill({"w": memory.tensor()})
            driver.is_mapped = True
        assert driver.keys
        driver.is_mapped = False
    assert not driver.keys


@pytest.mark.parametrize("is_mapped", [False, True])
def test_a_staged_transfer_of_a_lost_broker_is_over_if_the_driver_agrees(
    broker: ScriptedBroker, driver: Acl, client: BrokerClient, memory: Memory, is_mapped: bool
) -> None:
    broker.on_acquire = Script(memory, COPY, STAGED, is_lost=True)
    driver.is_mapped = is_mapped
    with pytest.raises(BrokerError) as caught:
        client.acquire(KEY, {"w": memory.tensor()})
    assert (caught.value.touched, caught.value.quiesced) == (True, not is_mapped)
    assert bool(driver.keys) is is_mapped
    assert not stage_ids(client)


@pytest.mark.parametrize("is_staged", [True, False])
def test_the_way_that_the_broker_picked_decides_whether_it_still_reaches_the_memory(
    driver: Acl, memory: Memory, is_staged: bool
) -> None:
    served: set[str] = set()
    stage = SimpleNamespace(
        add=lambda name, *_: served.add(name), remove=served.discard, serves=served.__contains__
    )  # fmt: skip
    shared = kind_of("npu").share(describe({"w": memory.tensor()}), Terms(), deadline=1e9)
    assert isinstance(shared, DeviceShared)
    shared.stage(cast(Session, SimpleNamespace(staging=stage)), 10.0)
    shared.note(resources_pb2.Publication(is_staged=is_staged))
    assert shared.is_served
    served.clear()
    assert shared.is_served is not is_staged
    shared.close()
