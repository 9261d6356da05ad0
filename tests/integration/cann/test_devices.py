"""Instances on cards, a real broker, the real datasystem: weights move where they lie, and nothing else does."""

from __future__ import annotations

import grpc
import numpy
import pytest

from doubles.cann.control import card_name
from support import device_instance as instance
from support.device_host import DeviceHost, cards, published_on, wait_until_idle
from support.device_instance import MIXED, Tensor
from support.raw_client import RawClient, publish_request
from weight_broker import BrokerClient, Reason, WeightsNotFound
from weight_broker.connection.channel import decode_error
from weight_broker.v1 import inspection_service_pb2 as inspection
from weight_broker.v1 import weight_set_pb2
from weight_broker.wire import key_to_wire

KIB, MIB = 1 << 10, 1 << 20

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("chunks", [False, True], ids=["plain allocations", "chunks"])
def test_the_second_instance_is_filled_from_another_card_bit_for_bit(device_host: DeviceHost, chunks: bool) -> None:
    broker = device_host.start_broker()
    first, second = device_host.start_instance("first"), device_host.start_instance("second")
    first.call(instance.create, "model", 0, MIXED, 7, chunks=chunks)
    second.call(instance.create, "model", 1, MIXED, None, chunks=chunks)
    assert first.call(instance.acquire_or_lease, "model").source == "lease"
    assert first.call(instance.publish, "model").error == ""
    filled = second.call(instance.acquire_or_load, "model", 8)
    assert (filled.source, filled.data_plane, filled.path) == ("first", "datasystem", "copy")
    assert second.call(instance.digest, "model") == first.call(instance.digest, "model")
    assert published_on(broker) == [("first", card_name(0)), ("second", card_name(1))]
    assert {name for name, card in cards(broker).items() if card.sender_pid} == {card_name(0), card_name(1)}
    for one in (first, second):
        assert one.call(instance.retract, "model").error == ""
        assert one.call(instance.exports) == 0
    wait_until_idle(broker)
    assert device_host.cann.violations() == []


def test_an_instance_on_the_same_card_is_filled_by_a_copy_on_the_card(device_host: DeviceHost) -> None:
    device_host.start_broker()
    first, second = device_host.start_instance("first"), device_host.start_instance("second")
    first.call(instance.create, "model", 2, MIXED, 7)
    second.call(instance.create, "model", 2, MIXED, None)
    first.call(instance.publish, "model")
    filled = second.call(instance.acquire, "model")
    assert (filled.source, filled.data_plane, filled.path) == ("first", "local", "copy")
    assert second.call(instance.digest, "model") == first.call(instance.digest, "model")
    assert second.call(instance.exports) == 0
    assert device_host.cann.violations() == []


def test_cards_that_start_at_once_read_the_disk_once_and_become_sources(device_host: DeviceHost) -> None:
    broker = device_host.start_broker()
    processes = [device_host.start_instance(f"instance-{card}") for card in range(4)]
    for card, process in enumerate(processes):
        process.call(instance.create, "model", card, MIXED)
    loads = [process.begin(instance.acquire_or_load, "model", 7) for process in processes]
    sources = [load(90).source for load in loads]
    assert sources.count("disk") == 1
    assert set(sources) <= {"disk", *(f"instance-{card}" for card in range(4))}
    assert len({process.call(instance.digest, "model") for process in processes}) == 1
    assert published_on(broker) == [(f"instance-{card}", card_name(card)) for card in range(4)]
    for process in processes:
        process.kill()
    wait_until_idle(broker)


@pytest.mark.parametrize(
    "tensors",
    [
        pytest.param([Tensor("one", (3 * MIB,), "uint8")], id="one tensor"),
        pytest.param(
            [Tensor(f"t{number:04}", (number % 977 + 1, 3), "int8") for number in range(5000)], id="5000 small tensors"
        ),
        pytest.param(
            [Tensor(f"t{number:03}", (1 + (number * 7919) % 60_000,), "float16") for number in range(400)],
            id="400 tensors of mixed size",
        ),
        pytest.param([Tensor("empty", (0,)), Tensor("scalar", ())], id="next to nothing"),
    ],
)
def test_any_number_of_tensors_arrives_whole(device_host: DeviceHost, tensors: list[Tensor]) -> None:
    device_host.start_broker()
    first, second = device_host.start_instance("first"), device_host.start_instance("second")
    first.call(instance.create, "model", 0, tensors, 7)
    second.call(instance.create, "model", 1, tensors, 99)
    assert first.call(instance.publish, "model").error == ""
    filled = second.call(instance.acquire, "model")
    assert (filled.error, filled.source) == ("", "first")
    assert second.call(instance.digest, "model") == first.call(instance.digest, "model")
    assert device_host.cann.violations() == []


def test_another_layout_is_refused_before_a_byte_is_written(device_host: DeviceHost) -> None:
    device_host.start_broker()
    first, second = device_host.start_instance("first"), device_host.start_instance("second")
    first.call(instance.create, "model", 0, MIXED, 7)
    second.call(instance.create, "model", 1, [MIXED[0]._replace(dtype="float16"), *MIXED[1:]], 5)
    before = second.call(instance.digest, "model")
    first.call(instance.publish, "model")
    outcome = second.call(instance.acquire, "model")
    assert (outcome.error, outcome.touched, outcome.quiesced) == ("LayoutMismatch", False, True)
    assert "a.weight" in outcome.message
    assert "dtype" in outcome.message
    assert second.call(instance.digest, "model") == before
    assert second.call(instance.exports) == 0


def test_two_publications_of_the_same_memory_end_one_by_one(device_host: DeviceHost) -> None:
    broker = device_host.start_broker()
    first, second = device_host.start_instance("first"), device_host.start_instance("second")
    first.call(instance.create, "model", 0, MIXED, 7)
    first.call(instance.publish, "model")
    first.call(instance.alias, "model", "other")
    first.call(instance.publish, "other")
    assert cards(broker)[card_name(0)].region_count == 1, "the same memory is mapped once"
    assert first.call(instance.retract, "model").error == ""
    second.call(instance.create, "other", 1, MIXED)
    assert second.call(instance.acquire, "other").source == "first"
    assert second.call(instance.digest, "other") == first.call(instance.digest, "other")
    assert first.call(instance.retract, "other").error == ""
    wait_until_idle(broker)
    first.call(instance.free, "model")


def test_a_client_that_closes_gives_its_memory_back_first(device_host: DeviceHost) -> None:
    broker = device_host.start_broker()
    first = device_host.start_instance("first")
    first.call(instance.create, "model", 0, MIXED, 7)
    first.call(instance.publish, "model")
    first.call(instance.close)
    assert first.call(instance.exports) == 0
    first.call(instance.free, "model")
    wait_until_idle(broker)
    assert device_host.cann.violations() == []


def test_memory_of_another_kind_is_no_source_and_explain_says_so(device_host: DeviceHost) -> None:
    broker = device_host.start_broker()
    first = device_host.start_instance("first")
    first.call(instance.create, "model", 0, MIXED, 7)
    first.call(instance.publish, "model")
    key = instance.key_of("model")
    with BrokerClient(broker.runtime_directory) as client, pytest.raises(WeightsNotFound):
        client.acquire(key, {"a": numpy.empty(4, "float32")}, wait=False)
    explained = broker.inspection.Explain(
        inspection.ExplainRequest(key=key_to_wire(key), device_kind=weight_set_pb2.DEVICE_KIND_CPU), timeout=60
    )
    (candidate,) = explained.candidates
    assert candidate.refusal == inspection.Candidate.REFUSAL_DEVICE_KIND
    assert "it is in npu memory" in candidate.detail


def test_a_card_that_this_host_does_not_have_is_named_and_nothing_changes(device_host: DeviceHost) -> None:
    broker = device_host.start_broker()
    with RawClient(broker.runtime_directory) as raw:
        request = publish_request("model", region_id="r", request_id="1")
        del request.regions[:]
        request.regions.add(
            region_id="r",
            device_kind=weight_set_pb2.DEVICE_KIND_NPU,
            size_bytes=4096,
            device_id="npu:77",
            npu_allocation=weight_set_pb2.NpuAllocation(export_key=b"k"),
        )
        with pytest.raises(grpc.RpcError) as refused:
            raw.weight_broker.Publish(request, metadata=raw.metadata, timeout=60)
    error = decode_error(refused.value)
    assert error.reason is Reason.INVALID_ARGUMENT
    assert "npu:77" in error.message
    assert f"{card_name(0)}, {card_name(1)}" in error.message
    assert broker.publications() == []
