"""A GPU's memory on the wire: what the broker takes, and what its processes are told to open."""

from __future__ import annotations

import asyncio

import pytest

from support.kinds import RecordedEvents
from support.received import as_received
from support.scripted_cards import ScriptedCards
from weight_broker.digest import FULL_BLOCK_BYTES, ContentDigests, DigestAlgorithm, DigestCoverage
from weight_broker.errors import InvalidArgument, PublishRefused
from weight_broker.key import WeightSetKey
from weight_broker.layout import Layout, TensorSpec
from weight_broker.v1 import weight_broker_service_pb2, weight_set_pb2
from weight_broker.wire import digests_to_wire, key_to_wire, layout_to_wire
from weight_brokerd.api import publish_request as validation
from weight_brokerd.cards.configuration import CardsConfiguration
from weight_brokerd.cards.messages import ImportRegion
from weight_brokerd.core.publications import Offer
from weight_brokerd.kinds.cuda.kind import CudaKind
from weight_brokerd.kinds.host.kind import HostKind
from weight_brokerd.kinds.host.regions import RegionTable
from weight_brokerd.kinds.published import PublishedMemory
from weight_brokerd.kinds.registry import Kinds
from weight_brokerd.kinds.steps import at_once

GPU = "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"
HANDLE = bytes(range(64))
DIGESTS = ContentDigests(DigestAlgorithm.MULTILINEAR_64, DigestCoverage.FULL, FULL_BLOCK_BYTES, (7,))


def publish_request(handle: bytes = HANDLE, gpu: str = GPU) -> weight_broker_service_pb2.PublishRequest:
    region = weight_set_pb2.Region(
        region_id="cuda-1",
        device_kind=weight_set_pb2.DEVICE_KIND_CUDA,
        size_bytes=4096,
        device_id=gpu,
        cuda_allocation=weight_set_pb2.CudaAllocation(ipc_handle=handle),
    )
    return weight_broker_service_pb2.PublishRequest(
        request_id="request-1",
        key=key_to_wire(WeightSetKey("m")),
        layout=layout_to_wire(Layout([TensorSpec("w", "int8", (4,), (1,), 4)])),
        digests=[digests_to_wire(DIGESTS)],
        regions=[region],
        placements=[weight_set_pb2.TensorPlacement(region_index=0, offset_bytes=8)],
    )


def with_gpu() -> Kinds:
    """A host with one GPU."""
    gpus = ScriptedCards(GPU)
    configuration = CardsConfiguration("", 0, kind="cuda")
    return Kinds([CudaKind(configuration, RecordedEvents(), is_wanted=True, supervise=gpus.supervise)])


def offered(
    request: weight_broker_service_pb2.PublishRequest, kinds: Kinds | None = None
) -> tuple[Offer, PublishedMemory]:
    """What the broker understands."""

    async def parse() -> tuple[Offer, PublishedMemory]:
        kind = await validation.published_kind(request, kinds or with_gpu())
        return at_once(validation.offer(as_received(request), "instance-1", kind))

    return asyncio.run(parse())


def test_an_allocation_is_what_its_gpu_is_to_open() -> None:
    offer, memory = offered(publish_request())
    assert (offer.device_kind, offer.device_id) == ("cuda", GPU)
    expected = ImportRegion("instance-1/cuda-1", 4096, ipc_handle=HANDLE.hex(), device_id=GPU)
    assert memory.place.regions == (expected,)
    assert HANDLE not in memory.digests + memory.place.granted, "whoever knows the handle could open the memory"


@pytest.mark.parametrize("length", [0, 63, 65])
def test_a_handle_of_another_length_is_none(length: int) -> None:
    with pytest.raises(InvalidArgument, match=r"ipc_handle.*64 bytes"):
        offered(publish_request(bytes(length)))


def test_a_gpu_of_another_host_is_refused_with_those_that_are_here() -> None:
    with pytest.raises(InvalidArgument, match=GPU):
        offered(publish_request(gpu="GPU-x"))


def test_a_broker_without_gpus_says_what_it_serves() -> None:
    with pytest.raises(PublishRefused, match=r"cuda memory; this broker serves: cpu"):
        offered(publish_request(), Kinds([HostKind(RegionTable(regions_per_instance=1))]))
