"""A cold-load lease is held by somebody who knows of it: calls that end before their answer give it back."""

from __future__ import annotations

import grpc
import pytest

from support.broker_process import BrokerProcess
from support.raw_client import TOKEN, RawClient, acquire_request
from support.rpc_errors import assert_no_defect
from support.waiting import eventually
from weight_broker.v1 import inspection_service_pb2 as inspection
from weight_broker.v1 import weight_broker_service_pb2 as pb
from weight_broker.v1.weight_broker_service_pb2_grpc import WeightBrokerServiceStub

NO_WINDOW = [("grpc.http2.lookahead_bytes", 0), ("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]
"""A channel that takes nothing in before it is read: the broker's answer stays unsent."""
REQUEST = acquire_request("absent", if_absent=pb.IF_ABSENT_LOAD)


def token_held(broker: BrokerProcess) -> int:
    """Fencing token of the only weight set's lease; 0 if nobody has it."""
    listed = broker.inspection.ListWeightSets(inspection.ListWeightSetsRequest(), timeout=60).weight_sets
    return max((one.cold_load_lease.fencing_token for one in listed), default=0)


@pytest.mark.parametrize("end", ["cancelled", "past its deadline"])
def test_a_lease_goes_on_when_its_call_ends_before_the_answer_was_sent(broker: BrokerProcess, end: str) -> None:
    """The instance lives, so that nothing but the end of the call says that nobody is going to load."""
    with (
        RawClient(broker.runtime_directory, "unaware") as unaware,
        RawClient(broker.runtime_directory, "next") as other,
        grpc.insecure_channel(f"unix:{broker.socket_path}", options=NO_WINDOW) as channel,
    ):
        timeout = 60 if end == "cancelled" else 2
        stub = WeightBrokerServiceStub(channel)
        unread = stub.Acquire(REQUEST, metadata=((TOKEN, unaware.token),), timeout=timeout)
        eventually(lambda: token_held(broker))
        unheard = token_held(broker)
        waiting = other.acquire("absent", if_absent=pb.IF_ABSENT_LOAD, timeout=30)
        assert next(waiting).waiting.cold_load_lease.fencing_token == unheard
        if end == "cancelled":
            unread.cancel()
        told = [answer for answer in waiting if answer.HasField("cold_load")]
        assert [one.cold_load.cold_load_lease.fencing_token > unheard for one in told] == [True]
        assert token_held(broker) == told[0].cold_load.cold_load_lease.fencing_token
    assert_no_defect(broker.log)


def test_who_reads_the_answer_to_its_end_keeps_the_lease(broker: BrokerProcess) -> None:
    with (
        RawClient(broker.runtime_directory, "loader") as loader,
        grpc.insecure_channel(f"unix:{broker.socket_path}", options=NO_WINDOW) as channel,
    ):
        for number, stub in enumerate([loader.weight_broker, WeightBrokerServiceStub(channel)]):
            request = acquire_request(f"absent-{number}", if_absent=pb.IF_ABSENT_LOAD)
            stream = stub.Acquire(request, metadata=loader.metadata, timeout=60)
            [answer] = stream
            lease = answer.cold_load.cold_load_lease
            stream.cancel()  # as the end of whatever follows: the call is over, and this changes nothing
            extend = pb.ReportLoadRequest(weight_set_id=lease.weight_set_id, fencing_token=lease.fencing_token)
            extend.extend.SetInParent()
            kept = loader.weight_broker.ReportLoad(extend, metadata=loader.metadata, timeout=60).cold_load_lease
            assert kept.fencing_token == lease.fencing_token
        assert broker.host().cold_load_lease_count == 2
    assert_no_defect(broker.log)


def test_calls_that_are_cancelled_at_any_moment_leave_a_lease_with_somebody_or_nobody(broker: BrokerProcess) -> None:
    """Whoever gives up after the first part of the answer may have the lease or not; it is never in the way."""
    with RawClient(broker.runtime_directory, "hasty") as hasty:
        for number in range(100):
            request = acquire_request(f"absent-{number}", if_absent=pb.IF_ABSENT_LOAD)
            stream = hasty.weight_broker.Acquire(request, metadata=hasty.metadata, timeout=60)
            if number % 2:
                next(stream)
            stream.cancel()
        eventually(lambda: broker.host().waiting_acquisition_count == 0)
        with RawClient(broker.runtime_directory, "after") as after:
            hasty.close()
            for number in range(100):
                [*_, answer] = after.acquire(f"absent-{number}", if_absent=pb.IF_ABSENT_LOAD)
                assert answer.HasField("cold_load")
    assert_no_defect(broker.log)
