"""The end of a broker, by SIGTERM and by an administrator: nothing new, what runs may finish, nothing holds it up."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2

from support import health
from support.broker_process import BrokerProcess
from support.raw_client import RawClient, publish_request
from support.rpc_errors import Refusal, assert_no_defect, refusal_of
from support.scene import SERVICES
from support.waiting import eventually
from weight_broker.errors import Reason
from weight_broker.v1 import administration_service_pb2 as administration
from weight_broker.v1 import inspection_service_pb2 as inspection
from weight_broker.v1 import weight_broker_service_pb2 as pb
from weight_broker.v1.inspection_service_pb2_grpc import InspectionServiceStub
from weight_broker.v1.weight_broker_service_pb2_grpc import WeightBrokerServiceStub


@pytest.fixture
def broker(start_broker: Callable[..., BrokerProcess]) -> BrokerProcess:
    """It lets transfers run for longer than a test takes: if it ends, that is for another reason than its limit."""
    return start_broker(WEIGHT_BROKER_LIMITS_DRAIN_SECONDS="600")


@pytest.fixture
def source(broker: BrokerProcess) -> Iterator[RawClient]:
    with RawClient(broker.runtime_directory, "source") as source:
        source.publish()
        yield source


@pytest.fixture
def receiver(broker: BrokerProcess) -> Iterator[RawClient]:
    with RawClient(broker.runtime_directory, "receiver") as receiver:
        yield receiver


def terminate(broker: BrokerProcess) -> None:
    """SIGTERM; returns when the broker has heard it."""
    assert broker.process is not None
    broker.process.send_signal(signal.SIGTERM)
    eventually(lambda: broker.host().draining)


def exit_status(broker: BrokerProcess) -> int:
    assert broker.process is not None
    return broker.process.wait(60)


def refusal(call: Callable[[], object]) -> Refusal:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return refusal_of(caught.value)


def test_a_running_transfer_finishes_and_nothing_new_begins(
    broker: BrokerProcess, source: RawClient, receiver: RawClient
) -> None:
    acquire = receiver.acquire()
    transfer_id = next(acquire).granted.transfer_id
    terminate(broker)
    for refused in (
        refusal(lambda: next(receiver.acquire())),
        refusal(lambda: next(receiver.acquire("absent", if_absent=pb.IF_ABSENT_LOAD))),
        refusal(lambda: source.publish("more", region_id="more")),
    ):
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.DRAINING)
    assert broker.process is not None
    assert broker.process.poll() is None, "it waits for the transfer"
    receiver.report_success(transfer_id)
    assert next(acquire).done.report.transfer_id == transfer_id
    assert exit_status(broker) == 0
    assert_no_defect(broker.log)


def test_who_waits_for_a_cold_load_is_told_at_once(broker: BrokerProcess, receiver: RawClient) -> None:
    with RawClient(broker.runtime_directory, "loader") as loader:
        assert next(loader.acquire("absent", if_absent=pb.IF_ABSENT_LOAD)).HasField("cold_load")
        waiting = receiver.acquire("absent", if_absent=pb.IF_ABSENT_LOAD, timeout=60)
        assert next(waiting).HasField("waiting")
        assert broker.process is not None
        broker.process.send_signal(signal.SIGTERM)
        assert refusal(lambda: next(waiting)).reason is Reason.DRAINING
        assert exit_status(broker) == 0


def test_an_idle_broker_stops_although_watches_are_open(broker: BrokerProcess, source: RawClient) -> None:
    watch = broker.inspection.Watch(inspection.WatchRequest(), timeout=60)
    next(watch)
    health_watch = health.watch(broker.channel)
    next(health_watch)
    assert broker.process is not None
    broker.process.send_signal(signal.SIGTERM)
    list(watch)  # both end in order: the broker has said all it had to say
    assert [one.status for one in health_watch] == [health_pb2.HealthCheckResponse.NOT_SERVING]
    assert exit_status(broker) == 0
    assert not broker.socket_path.exists()
    assert_no_defect(broker.log)


def test_watches_that_nobody_reads_hold_nothing_up(broker: BrokerProcess, source: RawClient) -> None:
    """With a window of a few bytes and no reader, the broker cannot send even the first message."""
    closed = [("grpc.http2.lookahead_bytes", 0), ("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(f"unix:{broker.socket_path}", options=closed) as channel:
        names = ["", *(f"weight_broker.v1.{name}" for name in SERVICES)]
        watches = [health.watch(channel, name) for name in names]
        watches.append(InspectionServiceStub(channel).Watch(inspection.WatchRequest()))
        # The last call of the connection, which is heard although nobody reads its answer: the others have arrived.
        [publication] = broker.publications()
        request = pb.RetractRequest(publication_id=publication.publication_id)
        retraction = WeightBrokerServiceStub(channel).Retract.future(request, metadata=source.metadata)
        eventually(lambda: not broker.publications())
        assert broker.process is not None
        broker.process.send_signal(signal.SIGTERM)
        assert exit_status(broker) == 0
        for call in (*watches, retraction):
            call.cancel()
    assert_no_defect(broker.log)


def test_a_transfer_that_does_not_end_is_cut_off_at_the_limit(start_broker: Callable[..., BrokerProcess]) -> None:
    broker = start_broker(WEIGHT_BROKER_LIMITS_DRAIN_SECONDS="0.5")
    with RawClient(broker.runtime_directory, "source") as source, RawClient(broker.runtime_directory) as receiver:
        source.publish()
        acquire = receiver.acquire()
        next(acquire)
        assert broker.process is not None
        begun = time.monotonic()
        broker.process.send_signal(signal.SIGTERM)
        assert exit_status(broker) == 0
        assert time.monotonic() - begun >= 0.5, "the transfer has until then"
        assert refusal(lambda: next(acquire)).reason is Reason.BROKER_UNAVAILABLE


def test_a_second_signal_does_not_wait_for_the_transfer(
    broker: BrokerProcess, source: RawClient, receiver: RawClient
) -> None:
    acquire = receiver.acquire()
    next(acquire)
    terminate(broker)
    os.kill(broker.pid, signal.SIGTERM)
    assert exit_status(broker) == 0
    acquire.cancel()


def drain(client: RawClient, seconds: float) -> administration.DrainResponse:
    request = administration.DrainRequest()
    request.timeout.FromNanoseconds(int(seconds * 1e9))
    return client.administration.Drain(request, metadata=client.metadata, timeout=60)


def test_an_administrators_drain_says_what_still_runs_and_then_that_nothing_does(
    broker: BrokerProcess, source: RawClient, receiver: RawClient
) -> None:
    acquire = receiver.acquire()
    transfer_id = next(acquire).granted.transfer_id
    late = refusal(lambda: drain(source, 0.2))
    assert (late.code, late.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, Reason.DRAIN_TIMEOUT)
    assert late.metadata["running_transfers"] == "1"
    assert broker.host().draining, "it stays draining"
    assert refusal(lambda: next(receiver.acquire())).reason is Reason.DRAINING

    answers: list[administration.DrainResponse] = []
    waiter = threading.Thread(target=lambda: answers.append(drain(source, 50)))
    waiter.start()
    receiver.report_success(transfer_id)
    waiter.join(60)
    assert [answer.host.running_transfer_count for answer in answers] == [0]
    assert next(acquire).HasField("done")
    assert broker.process is not None
    assert broker.process.poll() is None, "a drain is not the end of the process"
    assert broker.host().publication_count == 1


def test_a_publication_can_be_retracted_while_the_broker_drains(broker: BrokerProcess, source: RawClient) -> None:
    drain(source, 1)
    [publication] = broker.publications()
    source.weight_broker.Retract(
        pb.RetractRequest(publication_id=publication.publication_id), metadata=source.metadata, timeout=60
    )
    assert broker.publications() == []


def test_an_administrators_drain_turns_health_but_not_liveness(broker: BrokerProcess, source: RawClient) -> None:
    assert health.check(broker.channel) == health_pb2.HealthCheckResponse.SERVING
    drain(source, 1)
    assert health.check(broker.channel) == health_pb2.HealthCheckResponse.NOT_SERVING
    assert health.check(broker.channel, "liveness") == health_pb2.HealthCheckResponse.SERVING


def test_a_retraction_that_runs_late_says_why(broker: BrokerProcess, source: RawClient, receiver: RawClient) -> None:
    acquire = receiver.acquire()
    transfer_id = next(acquire).granted.transfer_id
    [publication] = broker.publications()
    request = pb.RetractRequest(publication_id=publication.publication_id)
    late = refusal(lambda: source.weight_broker.Retract(request, metadata=source.metadata, timeout=1))
    assert (late.code, late.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, Reason.RETRACT_TIMEOUT)
    receiver.report_success(transfer_id)
    again = refusal(lambda: source.weight_broker.Retract(request, metadata=source.metadata, timeout=60))
    assert again.reason is Reason.PUBLICATION_NOT_FOUND, "it went with its last reader"


def test_a_wrong_request_is_told_so_also_while_the_broker_drains(broker: BrokerProcess, source: RawClient) -> None:
    drain(source, 1)
    request = publish_request()
    request.request_id = ""
    wrong = refusal(lambda: source.weight_broker.Publish(request, metadata=source.metadata, timeout=60))
    assert wrong.reason is Reason.INVALID_ARGUMENT
