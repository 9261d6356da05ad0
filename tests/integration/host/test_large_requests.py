"""Very large requests, honest and hostile: others are answered meanwhile, and memory is not what one caller decides."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from support import actions
from support.broker_process import BrokerProcess
from support.instance_process import InstanceProcess
from support.raw_client import LAYOUT, RawClient, acquire_request, publish_request, raw_method, sealed_memory
from support.rpc_errors import refusal_of
from support.scene import ATTACHED_ONLY, METHODS, STREAMS
from support.waiting import eventually
from weight_broker.digest import ContentDigests, DigestAlgorithm, DigestCoverage
from weight_broker.errors import Reason
from weight_broker.layout import Layout, TensorSpec
from weight_broker.v1 import inspection_service_pb2 as inspection
from weight_broker.v1 import resources_pb2, weight_set_pb2
from weight_broker.v1 import weight_broker_service_pb2 as pb
from weight_broker.wire import digests_to_wire, layout_to_wire

TENSORS = 100_000
TENSOR_BYTES = 16
MIB = 1 << 20
PUBLISH = METHODS["Publish"]


def large_publish(model: str) -> pb.PublishRequest:
    """The weight set of a large mixture of experts: one region, a tensor for each expert's scale."""
    layout = Layout(
        [
            TensorSpec(f"model.layers.{number // 768}.mlp.experts.{number}.scale", "float32", (4,), (1,), TENSOR_BYTES)
            for number in range(TENSORS)
        ]
    )
    digests = ContentDigests(DigestAlgorithm.CRC32, DigestCoverage.FULL, 4096, tuple(range(TENSORS)))
    return pb.PublishRequest(
        key=publish_request(model).key,
        layout=layout_to_wire(layout),
        digests=[digests_to_wire(digests)],
        regions=[
            weight_set_pb2.Region(
                region_id="large",
                device_kind=weight_set_pb2.DEVICE_KIND_CPU,
                size_bytes=TENSORS * TENSOR_BYTES,
                host_memory=weight_set_pb2.HostMemory(),
            )
        ],
        placements=[
            weight_set_pb2.TensorPlacement(region_index=0, offset_bytes=TENSOR_BYTES * number)
            for number in range(TENSORS)
        ],
        request_id=f"publish {model}",
    )


def processor_ticks(pid: int) -> int:
    """The ticks of the clock that a process has run."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def peak_bytes(broker: BrokerProcess) -> int:
    status = Path(f"/proc/{broker.pid}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10


def resident_bytes(broker: BrokerProcess) -> int:
    return int(Path(f"/proc/{broker.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def flood(broker: BrokerProcess, method: str, wire: bytes, metadata: Any, calls: int = 3) -> list[grpc.RpcError]:
    """The same call on several connections at once; their errors."""
    errors: list[grpc.RpcError] = []

    def call() -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
        with grpc.insecure_channel(f"unix:{broker.socket_path}", options=options) as channel:
            send = raw_method(channel, method, streaming=method.rpartition("/")[2] in STREAMS)
            try:
                answer = send(wire, metadata=metadata, timeout=120)
                if method.rpartition("/")[2] in STREAMS:
                    next(answer)
            except grpc.RpcError as error:
                errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_others_are_answered_while_a_very_large_layout_is_checked(broker: BrokerProcess) -> None:
    wire = large_publish("large").SerializeToString()
    with RawClient(broker.runtime_directory, "publisher") as publisher:
        assert not publisher.offer_region("large", TENSORS * TENSOR_BYTES)
        broker.host()
        before = processor_ticks(broker.pid)
        publish: Any = raw_method(publisher.channel, PUBLISH, streaming=False)
        publishing = publish.future(wire, metadata=publisher.metadata, timeout=300)
        eventually(lambda: processor_ticks(broker.pid) - before >= 20 or publishing.done())
        for _ in range(5):
            broker.host()
            assert not publishing.done(), "the broker checks the layout, and answers others between two steps"
        answer = pb.PublishResponse.FromString(publishing.result())
        assert answer.publication.tensor_count == TENSORS
        # What was published is acquired and attached to, in answers as large.
        large = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(f"unix:{broker.socket_path}", options=large) as channel:
            request = acquire_request("large")
            request.path = resources_pb2.TRANSFER_PATH_ZERO_COPY
            request.ClearField("layout")
            acquire = raw_method(channel, METHODS["Acquire"], streaming=True)
            call = acquire(request.SerializeToString(), metadata=publisher.metadata, timeout=300)
            granted = pb.AcquireResponse.FromString(next(call)).granted
            call.cancel()
        sent = pb.PublishRequest.FromString(wire)
        assert granted.layout == sent.layout
        assert (list(granted.placements), list(granted.digests)) == (list(sent.placements), list(sent.digests))


@pytest.mark.parametrize("method", [METHODS[name] for name in ATTACHED_ONLY])
def test_what_a_caller_without_a_token_sends_is_never_read(broker: BrokerProcess, method: str) -> None:
    wire = b"\x12" + varint(60_000_000) + b"\x0a\x00" * 30_000_000
    broker.host()
    before = peak_bytes(broker)
    errors = flood(broker, method, wire, ())
    assert [refusal_of(error).reason for error in errors] == [Reason.NOT_ATTACHED] * 3
    assert peak_bytes(broker) - before < len(wire)


@pytest.mark.parametrize("name", ["GetHost", "ListWeightSets", "Explain"])
def test_inspection_takes_small_requests_only(broker: BrokerProcess, name: str) -> None:
    broker.host()
    before = peak_bytes(broker)
    errors = flood(broker, METHODS[name], b"\x92\x3f" + varint(20_000_000) + bytes(20_000_000), (), calls=6)
    assert [(refusal_of(error).reason, refusal_of(error).field) for error in errors] == [
        (Reason.INVALID_ARGUMENT, "request")
    ] * 6
    assert peak_bytes(broker) - before < 6 * 3 * 20_000_000


def test_health_takes_small_requests_only(broker: BrokerProcess) -> None:
    request = health_pb2.HealthCheckRequest(service="x" * MIB).SerializeToString()
    [error] = flood(broker, "/grpc.health.v1.Health/Check", request, (), calls=1)
    assert isinstance(error, grpc.Call)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_an_attached_caller_cannot_make_much_memory_of_little(broker: BrokerProcess) -> None:
    """Ten million tensors of two bytes would be gigabytes."""
    wire = b"\x12" + varint(20_000_000) + b"\x0a\x00" * 10_000_000
    with RawClient(broker.runtime_directory) as client:
        before = peak_bytes(broker)
        errors = flood(broker, PUBLISH, wire, client.metadata)
        assert [(refusal_of(error).reason, refusal_of(error).field) for error in errors] == [
            (Reason.INVALID_ARGUMENT, "layout.tensors")
        ] * 3
        assert peak_bytes(broker) - before < 600 * MIB
        assert client.publish().publication_id, "the caller is as welcome as before"


def test_a_call_that_waits_keeps_nothing_of_its_request(broker: BrokerProcess) -> None:
    wire = acquire_request(if_absent=pb.IF_ABSENT_LOAD).SerializeToString()
    ballast = (b"\x92\x3f" + varint(4_000_000) + bytes(4_000_000)) * 10
    with RawClient(broker.runtime_directory) as client:
        acquire = raw_method(client.channel, METHODS["Acquire"], streaming=True)
        before = resident_bytes(broker)
        calls = [acquire(wire + ballast, metadata=client.metadata, timeout=300) for _ in range(8)]
        for call in calls:
            next(call)  # the lease, or that it waits
        # Some of what was freed stays with the allocator. A request that is kept takes nearly twice its size.
        eventually(lambda: resident_bytes(broker) - before < len(calls) * len(ballast))
        for call in calls:
            call.cancel()


def test_a_compressed_request_is_refused_unseen(broker: BrokerProcess) -> None:
    """A small one could become any size."""
    with grpc.insecure_channel(f"unix:{broker.socket_path}", compression=grpc.Compression.Gzip) as channel:
        call = raw_method(channel, METHODS["Explain"], streaming=False)
        with pytest.raises(grpc.RpcError) as refused:
            call(inspection.ExplainRequest(weight_set_id="0" * 100_000).SerializeToString(), timeout=60)
    assert isinstance(refused.value, grpc.Call)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_callers_that_never_send_their_request_do_not_keep_others_from_being_read(broker: BrokerProcess) -> None:
    never = threading.Event()

    def nothing() -> Iterator[bytes]:
        never.wait()
        yield b""

    with grpc.insecure_channel(f"unix:{broker.socket_path}") as channel:
        call: Any = channel.stream_unary(METHODS["GetHost"])
        silent = [call.future(nothing(), timeout=300) for _ in range(4)]
        try:
            assert broker.host().pid == broker.pid
            for refused in silent:
                with pytest.raises(grpc.RpcError) as error:
                    refused.result()
                assert (refusal_of(error.value).field, "'incomplete'" in refusal_of(error.value).message) == (
                    "request",
                    True,
                )
        finally:
            never.set()


def test_calls_of_a_process_that_never_send_their_request_do_not_keep_other_processes_from_being_read(
    broker: BrokerProcess, start_instance: Callable[..., InstanceProcess]
) -> None:
    other = start_instance("other")
    never = threading.Event()

    def nothing() -> Iterator[bytes]:
        never.wait()
        yield b""

    with RawClient(broker.runtime_directory) as client:
        call: Any = client.channel.stream_unary(PUBLISH)
        silent = [call.future(nothing(), metadata=client.metadata, timeout=300) for _ in range(20)]
        try:
            other.call(actions.publish, "model", 1)
            assert sum(refused.done() for refused in silent) < 10, "they wait for each other"
        finally:
            never.set()
            for refused in silent:
                refused.cancel()


def test_a_call_without_a_request_is_refused(broker: BrokerProcess) -> None:
    with grpc.insecure_channel(f"unix:{broker.socket_path}") as channel:
        call: Any = channel.stream_unary(METHODS["GetHost"])
        with pytest.raises(grpc.RpcError) as refused:
            call(iter(()), timeout=60)
        assert refusal_of(refused.value).field == "request"
        assert call(iter([b""]), timeout=60)


def test_the_tensors_that_a_process_has_the_broker_remember_are_bounded(
    start_broker: Callable[..., BrokerProcess],
) -> None:
    broker = start_broker(WEIGHT_BROKER_LIMITS_LAYOUT_TENSORS_PER_PROCESS=str(2 * len(LAYOUT)))
    with RawClient(broker.runtime_directory) as client, RawClient(broker.runtime_directory) as other:
        first = client.publish("one", region_id="one")
        client.publish("two", region_id="two")
        for refused in (lambda: other.publish("three"), lambda: list(other.acquire("one"))):
            with pytest.raises(grpc.RpcError) as error:
                refused()
            refusal = refusal_of(error.value)
            assert (refusal.reason, refusal.metadata["limit"], refusal.metadata["value"]) == (
                Reason.LIMIT_EXCEEDED,
                "limits.layout_tensors_per_process",
                str(2 * len(LAYOUT)),
            )
        assert broker.host().publication_count == 2
        assert broker.host().waiting_acquisition_count == 0
        client.weight_broker.Retract(
            pb.RetractRequest(publication_id=first.publication_id), metadata=client.metadata, timeout=60
        )
        acquiring = other.acquire("two")
        other.report_success(next(acquiring).granted.transfer_id)
        assert next(acquiring).HasField("done")
        assert other.publish("three", offer=False).publication_id, "its region was not used up"


def test_tensors_that_lie_over_each_other_are_refused(broker: BrokerProcess) -> None:
    with RawClient(broker.runtime_directory) as client:
        assert not client.offer_region("region")
        request = publish_request()
        request.placements[0].offset_bytes = 32  # bias, 16 bytes, in the middle of embedding
        with pytest.raises(grpc.RpcError) as refused:
            client.weight_broker.Publish(request, metadata=client.metadata, timeout=60)
        assert refusal_of(refused.value).field == "placements"
        assert "do not overlap" in refusal_of(refused.value).message
        assert broker.host().publication_count == 0


def test_a_region_that_no_memory_can_fill_is_refused(broker: BrokerProcess) -> None:
    with RawClient(broker.runtime_directory) as client:
        descriptor = sealed_memory(1 << 46)
        try:
            assert client.offer_region("sparse", 1 << 46, descriptor=descriptor) == "REGION_REFUSED"
            assert client.offer_region("sparse", 4096, descriptor=descriptor) == "REGION_REFUSED"
        finally:
            os.close(descriptor)
        assert broker.host().region_count == 0


def varint(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
