"""Under each flood by one process the calls of the others succeed, and a refusal names the limit."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from support import actions
from support.broker_process import BrokerProcess
from support.instance_process import InstanceProcess
from support.raw_client import RawClient, connect, exchange, hello
from support.rpc_errors import refusal_of
from support.waiting import eventually
from weight_broker import Reason
from weight_broker.cli.inspector import Inspector
from weight_broker.v1 import inspection_service_pb2 as inspection
from weight_broker.v1 import weight_broker_service_pb2 as pb
from weight_broker.v1.inspection_service_pb2_grpc import InspectionServiceStub

Start = Callable[..., InstanceProcess]
REPOSITORY = Path(__file__).parents[3]
FLOODS = (
    "instances",
    "regions",
    "packets",
    "attachments",
    "strangers",
    "strangers_to_grpc",
    "acquires",
    "watches",
    "calls",
    "calls_without_a_token",
    "half_calls",
    "half_calls_without_a_token",
    "connections",
    "pings",
    "resets",
)


@contextlib.contextmanager
def flooding(broker: BrokerProcess, flood: str) -> Iterator[None]:
    """A hostile process for the length of a block."""
    command = [sys.executable, "-m", "benchmarks.flooder", str(broker.runtime_directory), flood]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"flooding\n"
            yield
            assert process.poll() is None, "the flood has ended before the test"
        finally:
            process.kill()


@pytest.mark.parametrize("flood", FLOODS)
def test_under_a_flood_every_call_of_an_honest_process_succeeds(
    broker: BrokerProcess, start_instance: Start, flood: str
) -> None:
    publisher, reader = start_instance("publisher"), start_instance("reader")
    publisher.call(actions.publish, "model", 1)
    reader.call(actions.prepare)
    broker.host()
    with flooding(broker, flood):
        for _ in range(3):
            reader.call(actions.prepare)
            assert reader.call(actions.acquire, "model").source_instance_name == "publisher"
            assert reader.call(actions.current) == actions.expected(1)
            assert broker.host().instance_count >= 2
        with Inspector(broker.runtime_directory) as operator:
            assert operator.host().pid == broker.pid
        newcomer = start_instance("newcomer")
        newcomer.call(actions.publish, "another model", 2)
        newcomer.call(actions.retract_all)
    eventually(lambda: broker.host().instance_count == 3)
    assert "internal_error" not in broker.log


def test_a_process_has_a_bounded_number_of_instances_and_others_have_theirs(
    start_broker: Callable[..., BrokerProcess], start_instance: Start
) -> None:
    broker = start_broker(WEIGHT_BROKER_LIMITS_INSTANCES_PER_PROCESS="2")
    with RawClient(broker.runtime_directory), RawClient(broker.runtime_directory):
        with connect(broker.runtime_directory) as third:
            refused = exchange(third, hello().SerializeToString()).refused
        assert refused.reason == Reason.LIMIT_EXCEEDED
        assert "limits.instances_per_process allows (2)" in refused.message
        start_instance("another process").call(actions.publish, "model", 1)
    with RawClient(broker.runtime_directory):
        assert broker.host().instance_count == 2


def test_the_regions_of_all_instances_of_a_process_are_bounded(start_broker: Callable[..., BrokerProcess]) -> None:
    broker = start_broker(WEIGHT_BROKER_LIMITS_REGIONS_PER_PROCESS="3")
    with RawClient(broker.runtime_directory) as one, RawClient(broker.runtime_directory) as other:
        assert [one.offer_region("a"), one.offer_region("b"), other.offer_region("a")] == ["", "", ""]
        assert other.offer_region("b") == Reason.LIMIT_EXCEEDED
        assert one.withdraw_region("a") == ""
        assert other.offer_region("b") == ""


def retry_of(error: grpc.RpcError) -> float:
    """Seconds after which the status says to ask again."""
    assert isinstance(error, grpc.Call)
    status = rpc_status.from_call(error)
    assert status is not None
    for detail in status.details:
        information = error_details_pb2.RetryInfo()
        if detail.Unpack(information):
            return float(information.retry_delay.ToNanoseconds() / 1e9)
    raise AssertionError("the status has no RetryInfo")


def refused(stream: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        next(stream)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    return caught.value


def test_open_acquires_of_a_process_are_bounded(start_broker: Callable[..., BrokerProcess]) -> None:
    broker = start_broker(WEIGHT_BROKER_LIMITS_ACQUIRES_PER_PROCESS="2")
    with RawClient(broker.runtime_directory) as client, RawClient(broker.runtime_directory) as waiting:
        [lease] = client.acquire(if_absent=pb.IF_ABSENT_LOAD)
        assert lease.HasField("cold_load")
        streams = [waiting.acquire(if_absent=pb.IF_ABSENT_WAIT) for _ in range(2)]
        assert all(next(stream).HasField("waiting") for stream in streams)
        error = refused(waiting.acquire(if_absent=pb.IF_ABSENT_WAIT))
        refusal = refusal_of(error)
        assert refusal is not None
        assert refusal.metadata["limit"] == "limits.acquires_per_process"
        assert retry_of(error) > 0
        streams[0].cancel()
        eventually(lambda: broker.host().waiting_acquisition_count == 1)
        assert next(waiting.acquire(if_absent=pb.IF_ABSENT_WAIT)).HasField("waiting")


def test_open_watches_of_a_process_are_bounded(start_broker: Callable[..., BrokerProcess]) -> None:
    broker = start_broker(WEIGHT_BROKER_LIMITS_WATCHES_PER_PROCESS="1")
    with RawClient(broker.runtime_directory) as client:
        first = client.inspection.Watch(inspection.WatchRequest(), metadata=client.metadata)
        assert next(first).snapshot
        error = refused(client.inspection.Watch(inspection.WatchRequest(), metadata=client.metadata))
        refusal = refusal_of(error)
        assert refusal is not None
        assert refusal.metadata["limit"] == "limits.watches_per_process"
        first.cancel()

        def opens() -> bool:
            again = client.inspection.Watch(inspection.WatchRequest(), metadata=client.metadata)
            try:
                return bool(next(again).snapshot)
            except grpc.RpcError:
                return False
            finally:
                again.cancel()

        eventually(opens)


WATCH_WITHOUT_A_TOKEN = """
import grpc, sys
from weight_broker.v1 import inspection_service_pb2 as inspection
from weight_broker.v1.inspection_service_pb2_grpc import InspectionServiceStub
stub = InspectionServiceStub(grpc.insecure_channel("unix:" + sys.argv[1]))
assert next(stub.Watch(inspection.WatchRequest(), timeout=60)).snapshot
"""


def test_callers_without_a_token_are_told_apart_by_their_processes(start_broker: Callable[..., BrokerProcess]) -> None:
    broker = start_broker(WEIGHT_BROKER_LIMITS_WATCHES_PER_PROCESS="1")
    broker.host()
    first = broker.inspection.Watch(inspection.WatchRequest(), timeout=120)
    assert next(first).snapshot
    refusal = refusal_of(refused(broker.inspection.Watch(inspection.WatchRequest(), timeout=120)))
    assert refusal is not None
    assert refusal.metadata["limit"] == "limits.watches_per_process"
    subprocess.run([sys.executable, "-c", WATCH_WITHOUT_A_TOKEN, str(broker.socket_path)], check=True, timeout=120)
    first.cancel()


def test_the_grpc_server_has_no_way_in_beside_the_counted_one(broker: BrokerProcess) -> None:
    """Who may look into the broker finds a way, and is not served."""
    assert {path.name for path in broker.runtime_directory.iterdir() if path.is_socket()} == {
        "broker.sock",
        "attach.sock",
    }
    descriptors = Path(f"/proc/{broker.pid}/fd")
    [way] = [path for path in descriptors.iterdir() if "inner.sock" in os.readlink(path)]
    with grpc.insecure_channel(f"unix:{way}", options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            InspectionServiceStub(channel).GetHost(inspection.GetHostRequest(), timeout=60)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "did not come through" in (caught.value.details() or "")


def test_calls_of_methods_that_do_not_exist_wait_their_turn_too(start_broker: Callable[..., BrokerProcess]) -> None:
    broker = start_broker(WEIGHT_BROKER_LIMITS_CALLS_PER_SECOND="1")
    broker.host()
    with grpc.insecure_channel(
        f"unix:{broker.socket_path}", options=[("grpc.use_local_subchannel_pool", 1)]
    ) as channel:
        method: Any = channel.unary_unary("/weight_broker.v1.InspectionService/NoMethod")
        calls = [method.future(b"", timeout=120) for _ in range(50)]
        assert calls[0].exception(120).code() is grpc.StatusCode.UNIMPLEMENTED
        assert not all(call.done() for call in calls)
        for call in calls:
            call.cancel()


def test_calls_beyond_the_pace_wait_and_are_not_refused(start_broker: Callable[..., BrokerProcess]) -> None:
    broker = start_broker(WEIGHT_BROKER_LIMITS_CALLS_PER_SECOND="50")
    with RawClient(broker.runtime_directory) as client:
        calls = [
            client.inspection.GetHost.future(inspection.GetHostRequest(), metadata=client.metadata, timeout=60)
            for _ in range(60)
        ]
        with RawClient(broker.runtime_directory) as other:
            assert broker.host().instance_count == 2
            assert other.offer_region("region") == ""
        assert all(call.result(60).host.pid == broker.pid for call in calls)


def is_open(connection: socket.socket) -> bool:
    """Whether the broker keeps the connection; it writes first."""
    try:
        while connection.recv(1 << 16):
            pass
    except BlockingIOError:
        return True
    except ConnectionError:
        return False
    return False


def test_the_calls_of_a_connection_too_many_are_refused_by_name_until_another_ends(
    start_broker: Callable[..., BrokerProcess],
) -> None:
    broker = start_broker(WEIGHT_BROKER_LIMITS_CONNECTIONS_PER_PROCESS="2")
    options = [("grpc.use_local_subchannel_pool", 1)]
    with contextlib.ExitStack() as stack:
        channels = [
            stack.enter_context(grpc.insecure_channel(f"unix:{broker.socket_path}", options=options)) for _ in range(3)
        ]

        def ask(channel: grpc.Channel) -> int:
            host = InspectionServiceStub(channel).GetHost(inspection.GetHostRequest(), timeout=60).host
            return int(host.pid)

        assert [ask(channel) for channel in channels[:2]] == [broker.pid] * 2
        with pytest.raises(grpc.RpcError) as caught:
            ask(channels[2])
        refusal = refusal_of(caught.value)
        assert refusal is not None
        assert refusal.metadata["limit"] == "limits.connections_per_process"
        assert retry_of(caught.value) > 0
        assert ask(channels[0]) == broker.pid
        channels[0].close()

        def is_served() -> bool:
            with contextlib.suppress(grpc.RpcError):
                return ask(channels[2]) == broker.pid
            return False

        eventually(is_served)


def test_the_newest_connections_of_a_process_with_too_many_are_closed(
    start_broker: Callable[..., BrokerProcess], start_instance: Start
) -> None:
    broker = start_broker(WEIGHT_BROKER_LIMITS_CONNECTIONS_PER_PROCESS="8")
    assert broker.host().instance_count == 0
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) for _ in range(40)]
        for connection in connections:
            connection.connect(str(broker.socket_path))
            connection.setblocking(False)
        eventually(lambda: sum(map(is_open, connections)) <= 8)
        assert broker.host().instance_count == 0, "the oldest connection of the process stays"
        publisher = start_instance("another process")
        publisher.call(actions.publish, "model", 1)
        eventually(lambda: "connections_closed" in broker.log)
