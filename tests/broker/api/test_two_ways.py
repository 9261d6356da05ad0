"""Device memory may be offered in two ways, mapped and staged: what the broker makes of both and of `cards.path`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from support.kinds import RecordedEvents, ServingConnections, npu_kind
from support.received import as_received
from support.scripted_cards import ScriptedCards
from weight_broker.digest import FULL_BLOCK_BYTES, ContentDigests, DigestAlgorithm, DigestCoverage
from weight_broker.errors import InvalidArgument, NotAttached, PublishRefused, TransferFailed
from weight_broker.key import WeightSetKey
from weight_broker.layout import Layout, TensorSpec
from weight_broker.v1 import resources_pb2, weight_set_pb2
from weight_broker.v1 import weight_broker_service_pb2 as pb
from weight_broker.wire import digests_to_wire, key_to_wire, layout_to_wire
from weight_brokerd.api import acquire_request, publish_request
from weight_brokerd.core.model import TransferPath
from weight_brokerd.dataplane.plane import Place
from weight_brokerd.kinds.registry import Kinds
from weight_brokerd.kinds.steps import at_once

T = TypeVar("T")
LAYOUT = layout_to_wire(Layout([TensorSpec("weight", "int8", (4,), (1,), 4)]))
EMPTY = layout_to_wire(Layout([TensorSpec("empty", "int8", (0,), (1,), 0)]))
DIGESTS = digests_to_wire(ContentDigests(DigestAlgorithm.MULTILINEAR_64, DigestCoverage.FULL, FULL_BLOCK_BYTES, (7,)))
OWNER = "instance-1"
NPU = weight_set_pb2.DEVICE_KIND_NPU


def publish(*ways: str, layout: weight_set_pb2.Layout = LAYOUT) -> pb.PublishRequest:
    """Offered `mapped`, `staged` or both."""
    request = pb.PublishRequest(
        request_id="r", key=key_to_wire(WeightSetKey("model")), layout=layout, digests=[DIGESTS]
    )
    if "mapped" in ways:
        offer_regions(request, layout)
    if "staged" in ways:
        request.staged.CopyFrom(weight_set_pb2.StagedMemory(stage_id="s", device_kind=NPU, device_id="npu:0"))
    return request


def acquire(*ways: str) -> pb.AcquireRequest:
    """Wanted `mapped`, `staged` or both."""
    request = pb.AcquireRequest(
        request_id="r",
        key=key_to_wire(WeightSetKey("model")),
        layout=LAYOUT,
        if_absent=pb.IF_ABSENT_FAIL,
        path=resources_pb2.TRANSFER_PATH_COPY if "mapped" in ways else resources_pb2.TRANSFER_PATH_STAGED,
        device_kind=NPU,
        device_id="npu:0",
        stage_id="s" if "staged" in ways else "",
    )
    if "mapped" in ways:
        offer_regions(request, LAYOUT)
    return request


def offer_regions(request: pb.PublishRequest | pb.AcquireRequest, layout: weight_set_pb2.Layout) -> None:
    if layout is LAYOUT:
        request.regions.add(
            region_id="region",
            device_kind=NPU,
            device_id="npu:0",
            size_bytes=4096,
            npu_allocation=weight_set_pb2.NpuAllocation(export_key=b"key"),
        )
    request.placements.add()


async def _with_npu(path: str, serving: tuple[str, ...], parse: Callable[[Kinds], Awaitable[T]]) -> T:
    kinds = Kinds([npu_kind(ScriptedCards("npu:0"), ServingConnections(*serving), RecordedEvents(), path)])
    kinds.start()
    try:
        return await parse(kinds)
    finally:
        await kinds.close()


def published(request: pb.PublishRequest, path: str, *serving: str) -> Place:
    async def parse(kinds: Kinds) -> Place:
        kind = await publish_request.published_kind(request, kinds)
        return at_once(publish_request.offer(as_received(request), OWNER, kind))[1].place

    return asyncio.run(_with_npu(path, serving, parse))


def acquired(request: pb.AcquireRequest, path: str, *serving: str) -> tuple[TransferPath, Place]:
    async def parse(kinds: Kinds) -> tuple[TransferPath, Place]:
        kind = await acquire_request.receiving_kind(request, kinds)
        call = acquire_request.Call("acquisition-1", OWNER, 0.0, 60.0)
        acquisition, destination = at_once(acquire_request.acquisition(as_received(request), call, kind))
        return acquisition.path, destination

    return asyncio.run(_with_npu(path, serving, parse))


WAYS = {
    ("auto", "mapped"): (True, False),
    ("auto", "staged"): (False, True),
    ("auto", "mapped", "staged"): (True, True),
    ("direct", "mapped"): (True, False),
    ("direct", "mapped", "staged"): (True, False),
    ("staged", "staged"): (False, True),
    ("staged", "mapped", "staged"): (False, True),
}
"""What is left of the two ways: (regions, stage)."""


@pytest.mark.parametrize(("case", "left"), WAYS.items(), ids=["-".join(case) for case in WAYS])
def test_the_broker_keeps_the_ways_that_it_may_take(case: tuple[str, ...], left: tuple[bool, bool]) -> None:
    path, *ways = case
    place = published(publish(*ways), path, OWNER)
    assert (bool(place.regions), place.stage is not None) == left
    taken, destination = acquired(acquire(*ways), path, OWNER)
    assert (bool(destination.regions), destination.stage is not None) == left
    assert taken is (TransferPath.COPY if left[0] else TransferPath.STAGED)


@pytest.mark.parametrize(("path", "way"), [("direct", "staged"), ("staged", "mapped")])
def test_a_way_that_the_settings_close_is_refused_with_the_setting(path: str, way: str) -> None:
    with pytest.raises(PublishRefused, match=r"cards\.path") as publishing:
        published(publish(way), path, OWNER)
    with pytest.raises(TransferFailed, match=r"cards\.path") as acquiring:
        acquired(acquire(way), path, OWNER)
    for refused in (publishing, acquiring):
        assert refused.value.metadata == ({"path": "staged"} if path == "staged" else {})


@pytest.mark.parametrize("path", ["auto", "staged"])
def test_a_stage_connection_that_has_ended_is_a_lost_connection_and_no_wrong_argument(path: str) -> None:
    for ways in (["staged"], ["mapped", "staged"]):
        with pytest.raises(NotAttached, match="no stage connection") as publishing:
            published(publish(*ways), path)
        with pytest.raises(NotAttached, match="no stage connection") as acquiring:
            acquired(acquire(*ways), path)
        assert publishing.value.lacks_stage
        assert acquiring.value.lacks_stage


def test_where_nothing_is_staged_no_connection_is_needed() -> None:
    assert published(publish("mapped", "staged"), "direct").stage is None


def test_both_ways_lead_to_the_same_memory() -> None:
    request = publish("mapped", "staged")
    request.staged.device_id = "npu:1"
    with pytest.raises(InvalidArgument, match=r"staged\.device_id.*as the regions"):
        published(request, "auto", OWNER)
    request.staged.device_kind = weight_set_pb2.DEVICE_KIND_CUDA
    with pytest.raises(InvalidArgument, match=r"staged\.device_kind.*as the regions"):
        published(request, "auto", OWNER)


def test_a_staged_acquisition_names_no_regions() -> None:
    request = acquire("mapped", "staged")
    request.path = resources_pb2.TRANSFER_PATH_STAGED
    with pytest.raises(InvalidArgument, match=r"regions.*none for TRANSFER_PATH_STAGED"):
        acquired(request, "auto", OWNER)


def test_what_has_no_content_is_not_staged() -> None:
    place = published(publish("mapped", "staged", layout=EMPTY), "auto", OWNER)
    assert not place.is_staged
    assert place.stage is None
