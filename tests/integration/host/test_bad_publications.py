"""A publication that is wrong in itself is refused by the name of the field, before anything of it is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import grpc
import pytest

from support.broker_process import BrokerProcess
from support.raw_client import publish_request
from support.rpc_errors import assert_no_defect
from support.scene import Scene
from weight_broker.errors import Reason
from weight_broker.v1 import weight_broker_service_pb2 as pb
from weight_broker.v1 import weight_set_pb2


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    broker = BrokerProcess(tmp_path_factory.mktemp("publications") / "run")
    try:
        with Scene(broker.start()) as scene:
            yield scene
        assert_no_defect(broker.log)
        assert broker.terminate() == 0
    finally:
        broker.close()


def set_rank(request: pb.PublishRequest) -> None:
    request.key.rank.tensor_parallel_rank = 1


def add_attribute_twice(request: pb.PublishRequest) -> None:
    request.key.engine_attributes.add(name="backend", value="y")


def reverse_tensors(request: pb.PublishRequest) -> None:
    request.layout.tensors.reverse()


def forge_fingerprint(request: pb.PublishRequest) -> None:
    request.layout.fingerprint = "0" * 64


def drop_digests(request: pb.PublishRequest) -> None:
    request.digests.clear()


def shorten_digests(request: pb.PublishRequest) -> None:
    del request.digests[0].values[-1]


def unknown_algorithm(request: pb.PublishRequest) -> None:
    request.digests[0].algorithm = 77  # type: ignore[assignment]  # an enum's number that nobody knows yet


def drop_placement(request: pb.PublishRequest) -> None:
    del request.placements[-1]


def place_in_no_region(request: pb.PublishRequest) -> None:
    request.placements[0].region_index = 1


def place_beyond_the_end(request: pb.PublishRequest) -> None:
    request.placements[1].offset_bytes = 4096 - 63


def place_at_the_end_of_numbers(request: pb.PublishRequest) -> None:
    request.placements[1].offset_bytes = (1 << 64) - 1


def place_alias_elsewhere(request: pb.PublishRequest) -> None:
    request.placements[3].offset_bytes = 128


def place_alias_nowhere(request: pb.PublishRequest) -> None:
    request.placements[3].region_index = (1 << 32) - 1


def place_empty_nowhere(request: pb.PublishRequest) -> None:
    request.placements[2].region_index = 7


def name_region_twice(request: pb.PublishRequest) -> None:
    request.regions.add().CopyFrom(request.regions[0])


def enlarge_region(request: pb.PublishRequest) -> None:
    request.regions[0].size_bytes = 8192


def foreign_handle(request: pb.PublishRequest) -> None:
    request.regions[0].npu_allocation.export_key = b"key"


def forget_request_id(request: pb.PublishRequest) -> None:
    request.request_id = ""


def forget_stage(request: pb.PublishRequest) -> None:
    request.key.ClearField("stage")


PUBLISH_FIELDS = {
    set_rank: "rank.tensor_parallel_rank",
    add_attribute_twice: "key.engine_attributes",
    forget_stage: "key.stage",
    reverse_tensors: "layout.tensors",
    forge_fingerprint: "layout.fingerprint",
    drop_digests: "digests",
    shorten_digests: "digests[0].values",
    unknown_algorithm: "digests[0].algorithm",
    drop_placement: "placements",
    place_in_no_region: "placements[bias].region_index",
    place_beyond_the_end: "placements[embedding].offset_bytes",
    place_at_the_end_of_numbers: "placements[embedding].offset_bytes",
    place_alias_elsewhere: "placements[head]",
    place_alias_nowhere: "placements[head].region_index",
    place_empty_nowhere: "placements[empty].region_index",
    name_region_twice: "regions[1].region_id",
    enlarge_region: "regions[scene].size_bytes",
    foreign_handle: "regions[0].handle",
    forget_request_id: "request_id",
}


@pytest.mark.parametrize(
    ("spoil", "field"), [pytest.param(spoil, field, id=spoil.__name__) for spoil, field in PUBLISH_FIELDS.items()]
)
def test_a_wrong_publication_is_refused_by_the_name_of_the_field(
    scene: Scene, spoil: Callable[[pb.PublishRequest], None], field: str
) -> None:
    request = scene.valid_request("Publish")
    assert isinstance(request, pb.PublishRequest)
    spoil(request)
    before = scene.state()
    refusal = scene.call("Publish", request.SerializeToString())
    assert refusal is not None
    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
    assert scene.state() == before


def test_memory_that_no_data_plane_reaches_is_refused_as_that(scene: Scene) -> None:
    request = scene.valid_request("Publish")
    assert isinstance(request, pb.PublishRequest)
    request.regions[0].device_kind = weight_set_pb2.DEVICE_KIND_NPU
    refusal = scene.call("Publish", request.SerializeToString())
    assert refusal is not None
    assert refusal.reason is Reason.PUBLISH_REFUSED


def test_a_layout_larger_than_any_memory_is_refused(scene: Scene) -> None:
    """Its size would not fit into the listings' numbers."""
    request = publish_request()
    tensor = weight_set_pb2.TensorSpec(
        dtype="uint8",
        shape=[1 << 46],
        stride=[1],
        storage_bytes=1 << 46,
        memory_format=weight_set_pb2.MEMORY_FORMAT_STRIDED,
    )
    del request.layout.tensors[:]
    for index in range(17):
        tensor.name = f"{index:02}"
        request.layout.tensors.append(tensor)
    refusal = scene.call("Publish", request.SerializeToString())
    assert refusal is not None
    assert (refusal.reason, refusal.field) == (Reason.INVALID_ARGUMENT, "layout.tensors")


def test_a_request_id_serves_one_publication_only(scene: Scene) -> None:
    first = scene.valid_request("Publish")
    assert isinstance(first, pb.PublishRequest)
    assert scene.call("Publish", first.SerializeToString()) is None
    assert scene.call("Publish", first.SerializeToString()) is None, "the same again is the same"
    first.key.model = "another"
    before = scene.state()
    refusal = scene.call("Publish", first.SerializeToString())
    assert refusal is not None
    assert (refusal.reason, refusal.field) == (Reason.INVALID_ARGUMENT, "request_id")
    assert scene.state() == before
    scene.reset()
