"""A GPU's memory on the wire: what the broker takes, and what its processes are told to open."""

from __future__ import annotations

import pytest

from weight_broker.digest import FULL_BLOCK_BYTES, ContentDigests, DigestAlgorithm, DigestCoverage
from weight_broker.errors import InvalidArgument, PublishRefused
from weight_broker.key import WeightSetKey
from weight_broker.layout import Layout, TensorSpec
from weight_broker.v1 import weight_broker_service_pb2, weight_set_pb2
from weight_broker.wire import digests_to_wire, key_to_wire, layout_to_wire
from weight_brokerd.api import fields as validation
from weight_brokerd.cards.messages import ImportRegion

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


def test_an_allocation_is_what_its_gpu_is_to_open() -> None:
    request = publish_request()
    assert validation.published_kind(request) == weight_set_pb2.DEVICE_KIND_CUDA
    offer, memory = validation.offer(request, "instance-1", validation.LayoutCache(), {"cpu", "cuda"}, {GPU})
    assert (offer.device_kind, offer.device_id) == ("cuda", GPU)
    assert memory.place is not None
    expected = ImportRegion("instance-1/cuda-1", 4096, ipc_handle=HANDLE.hex(), device_id=GPU)
    assert memory.place.regions == (expected,)
    assert HANDLE not in memory.grant, "whoever knows the handle could open the memory"


@pytest.mark.parametrize("length", [0, 63, 65])
def test_a_handle_of_another_length_is_none(length: int) -> None:
    with pytest.raises(InvalidArgument, match=r"ipc_handle.*64 bytes"):
        validation.offer(publish_request(bytes(length)), "instance-1", validation.LayoutCache(), {"cpu", "cuda"}, {GPU})


def test_a_gpu_of_another_host_is_refused_with_those_that_are_here() -> None:
    with pytest.raises(InvalidArgument, match=GPU):
        validation.offer(publish_request(gpu="GPU-x"), "instance-1", validation.LayoutCache(), {"cpu", "cuda"}, {GPU})


def test_a_broker_without_gpus_says_what_it_serves() -> None:
    with pytest.raises(PublishRefused, match=r"cuda memory; this broker serves: cpu"):
        validation.offer(publish_request(), "instance-1", validation.LayoutCache(), {"cpu"}, frozenset())
