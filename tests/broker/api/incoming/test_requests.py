"""Requests that are parsed in parts: the whole comes out, and nothing is parsed that is too much."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st

from support.proto_strategies import broken_bytes
from support.raw_client import LAYOUT, acquire_request, publish_request
from support.received import as_received
from weight_broker.errors import BrokerError, InvalidArgument
from weight_broker.layout import Layout, LayoutBuilder, TensorSpec
from weight_broker.v1 import inspection_service_pb2 as inspection
from weight_broker.v1 import resources_pb2, weight_set_pb2
from weight_broker.v1 import weight_broker_service_pb2 as pb
from weight_broker.wire import layout_from_wire, layout_to_wire
from weight_brokerd.api.incoming import requests
from weight_brokerd.api.incoming.layouts import LayoutCache
from weight_brokerd.api.incoming.requests import received
from weight_brokerd.api.incoming.turns import Turns
from weight_brokerd.api.incoming.wire_parts import Malformed, fields
from weight_brokerd.api.large_grant import large_grant
from weight_brokerd.kinds.steps import Steps, at_once


def tensors(count: int) -> list[TensorSpec]:
    specs = [TensorSpec(f"layers.{number:06}.weight", "float16", (2, 3), (3, 1), 12) for number in range(count)]
    return [*specs, TensorSpec("tied", "float16", (2, 3), (3, 1), 12, alias_of=specs[0].name)]


def large_request(count: int) -> pb.PublishRequest:
    request = publish_request()
    request.layout.CopyFrom(layout_to_wire(Layout(tensors(count))))
    del request.placements[:]
    for number in range(count + 1):
        request.placements.add(region_index=number % 3, offset_bytes=number * 16)
    return request


@pytest.mark.parametrize("count", [1, 127, 128, 129, 5000])
def test_a_request_that_is_parsed_in_parts_is_the_request(count: int) -> None:
    request = large_request(count)
    found = as_received(request)
    assert found.layout is not None
    assert found.layout == layout_from_wire(request.layout)
    assert found.layout.fingerprint == request.layout.fingerprint
    request.ClearField("layout")
    assert found.message == request


def test_a_layout_in_several_pieces_is_one_as_protobuf_says() -> None:
    request = large_request(300)
    message = weight_set_pb2.Layout()
    message.CopyFrom(request.layout)
    first, second = weight_set_pb2.Layout(), weight_set_pb2.Layout(fingerprint=message.fingerprint)
    first.tensors.extend(message.tensors[:150])
    second.tensors.extend(message.tensors[150:])
    wire = b"".join(pb.PublishRequest(layout=part).SerializeToString() for part in (first, second))
    assert at_once(received(wire, pb.PublishRequest, LayoutCache())).layout == layout_from_wire(message)


def test_a_request_without_a_layout_has_none_and_an_empty_layout_is_wrong() -> None:
    assert as_received(inspection.ExplainRequest(weight_set_id="0" * 32)).layout is None
    with pytest.raises(InvalidArgument, match="at least one tensor"):
        as_received(pb.AcquireRequest(layout=weight_set_pb2.Layout()))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_a_layout_that_comes_in_parts_is_the_layout(sizes: list[int]) -> None:
    specs = tensors(sum(sizes) + 1)
    builder = LayoutBuilder()
    start = 0
    for size in sizes:
        builder.add(specs[start : start + size])
        start += size
    builder.add(specs[start:])
    built, whole = builder.finish(), Layout(specs)
    assert built == whole
    assert (built.fingerprint, built.content_sizes, built.content_bytes) == (
        whole.fingerprint,
        whole.content_sizes,
        whole.content_bytes,
    )


def test_parts_in_the_wrong_order_are_refused() -> None:
    builder = LayoutBuilder()
    specs = tensors(2)
    builder.add(specs[1:2])
    with pytest.raises(InvalidArgument, match="not sorted"):
        builder.add(specs[:1])


@pytest.mark.parametrize("make", [publish_request, acquire_request])
@given(data=st.data())
def test_bytes_that_are_no_request_are_refused_as_protobuf_refuses_them(make: type, data: st.DataObject) -> None:
    """Groups aside, which no message of the broker has."""
    request: Message = make()
    wire = data.draw(broken_bytes(request))
    try:
        expected = type(request).FromString(wire)
    except DecodeError:
        with pytest.raises((DecodeError, Malformed, BrokerError)):
            at_once(received(wire, type(request), LayoutCache()))
        return
    try:
        found = at_once(received(wire, type(request), LayoutCache()))
    except (BrokerError, Malformed):
        return
    assert (found.layout is not None) == expected.HasField("layout")
    expected.ClearField("layout")
    assert found.message == expected


def empty(number: int, count: int) -> bytes:
    """So many empty messages of a field: two bytes each, a hundred once they are parsed."""
    return bytes([number << 3 | 2, 0]) * count


TOO_MANY = {
    "layout.tensors": pb.PublishRequest(layout=weight_set_pb2.Layout.FromString(empty(1, 200_001))).SerializeToString(),
    "placements": empty(5, 200_001),
    "regions": empty(4, 65_537),
    "digests": empty(3, 17),
    "key.engine_attributes": b"\x0a\x82\x10" + empty(9, 1025),
}


@pytest.mark.parametrize("field", TOO_MANY)
def test_what_repeats_too_often_is_refused_before_it_is_parsed(field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        at_once(received(TOO_MANY[field], pb.PublishRequest, LayoutCache()))
    assert refused.value.field == field
    assert refused.value.metadata["value"].startswith("'more than"), "the rest was not even counted"


def test_a_field_that_is_too_large_is_refused_by_name() -> None:
    request = pb.PublishRequest(request_id="x" * requests.MAXIMUM_FIELD_BYTES)
    with pytest.raises(InvalidArgument, match="request_id"):
        as_received(request)


@pytest.mark.parametrize(
    "wire", [b"\x0a", b"\x0a\x05abc", b"\xff" * 11, b"\x0b\x0c", b"\x00\x01", b"\x09abc", b"\x08\x80"]
)
def test_bytes_without_fields_are_malformed(wire: bytes) -> None:
    with pytest.raises(Malformed):
        list(fields(wire, 0, len(wire)))


def test_large_requests_take_turns_with_each_other_and_with_everything_else() -> None:
    order: list[str] = []

    def work(name: str) -> Steps[str]:
        for _ in range(3):
            order.append(name)
            yield
        return name

    async def other() -> None:
        for _ in range(12):
            order.append("-")
            await asyncio.sleep(0)

    async def run() -> list[str]:
        turns = Turns()
        first, second, _ = await asyncio.gather(turns.take(work("a")), turns.take(work("b")), other())
        return [first, second]

    assert asyncio.run(run()) == ["a", "b"]
    steps = [name for name in order if name != "-"]
    assert steps == ["a", "b"] * 3, "one step of each in turn"
    between = "".join(order).strip("-")
    assert not {"aa", "ab", "ba"} & {first + second for first, second in itertools.pairwise(between)}, "others go on"


def test_an_error_in_a_step_ends_the_work_and_nothing_else() -> None:
    def work() -> Steps[None]:
        yield
        raise InvalidArgument("field", 1, "2")

    async def run() -> None:
        turns = Turns()
        with pytest.raises(InvalidArgument):
            await turns.take(work())
        assert await turns.take(received(acquire_request().SerializeToString(), pb.AcquireRequest, LayoutCache()))

    asyncio.run(run())


@pytest.mark.parametrize("with_layout", [True, False])
def test_a_large_grant_is_the_message_that_a_small_one_would_be(*, with_layout: bool) -> None:
    layout = Layout(tensors(1000))
    head = pb.Granted(transfer_id="transfer-1", path=resources_pb2.TRANSFER_PATH_COPY)
    memory = pb.Granted(placements=large_request(1000).placements).SerializeToString()
    response = pb.AcquireResponse.FromString(at_once(large_grant(head, memory, layout if with_layout else None)))
    expected = pb.Granted.FromString(memory)
    expected.MergeFrom(head)
    if with_layout:
        layout_to_wire(layout, expected.layout)
    assert response == pb.AcquireResponse(granted=expected)


def test_the_small_layout_of_other_tests_goes_the_same_way() -> None:
    assert as_received(publish_request()).layout == LAYOUT
