"""Instances on GPUs and a real broker, on a double of NVIDIA's driver: weights move where they lie, and nothing else
does."""

from __future__ import annotations

from pathlib import Path

import pytest

from doubles.cuda.control import GPUS, Fault, uuid
from support import device_instance as instance
from support import gpu_instance as gpu
from support.device_host import cards, published_on, wait_until_idle
from support.device_instance import Tensor
from support.gpu_host import GpuHost
from support.waiting import eventually
from weight_broker.v1 import resources_pb2, weight_set_pb2

MIB = 1 << 20

pytestmark = pytest.mark.timeout(120)

MIXED = [
    Tensor("a.weight", (1024, 1536)),
    Tensor("b.weight", (700, 333), "float16"),
    Tensor("c.bias", (77,), "float32"),
    Tensor("d.scale", ()),
    Tensor("e.empty", (0, 4)),
    Tensor("f.int8", (3, 5), "int8"),
    Tensor("g.tied", (1024, 1536), alias_of="a.weight"),
]


@pytest.mark.parametrize("destination", [2, 1], ids=["the same GPU", "another GPU"])
def test_the_second_instance_is_filled_from_the_first_bit_for_bit(gpu_host: GpuHost, destination: int) -> None:
    broker = gpu_host.start_broker()
    first, second = gpu_host.start_instance("first"), gpu_host.start_instance("second")
    first.call(gpu.create, "model", 2, MIXED, 7)
    second.call(gpu.create, "model", destination, MIXED)
    assert first.call(instance.acquire_or_lease, "model").source == "lease"
    assert first.call(instance.publish, "model").error == ""
    filled = second.call(gpu.acquire_or_load, "model", 8)
    assert (filled.source, filled.data_plane, filled.path) == ("first", "local", "copy")
    assert second.call(gpu.digest, "model") == first.call(gpu.digest, "model")
    assert published_on(broker) == sorted([("first", uuid(2)), ("second", uuid(destination))])
    assert gpu_host.cuda.opened() == []
    for one in (first, second):
        assert one.call(instance.retract, "model").error == ""
        one.call(gpu.free, "model")
    wait_until_idle(broker)
    assert gpu_host.cuda.violations() == []


def test_tensors_in_other_segments_at_other_places_are_filled(gpu_host: GpuHost) -> None:
    gpu_host.start_broker()
    first, second = gpu_host.start_instance("first"), gpu_host.start_instance("second")
    tensors = [Tensor(f"layer.{index}", (index * 977 + 1,), "int8") for index in range(400)]
    first.call(gpu.create, "model", 0, tensors, 7)
    second.call(gpu.create, "model", 3, list(reversed(tensors)), segment_bytes=4 * MIB)
    assert len(second.call(gpu.regions, "model")) > len(first.call(gpu.regions, "model"))
    first.call(instance.publish, "model")
    assert second.call(instance.acquire, "model").error == ""
    assert second.call(gpu.digest_of_tensors, "model") == first.call(gpu.digest_of_tensors, "model")
    assert gpu_host.cuda.violations() == []


def test_a_gpu_is_known_by_its_uuid_whatever_number_a_process_gives_it(gpu_host: GpuHost) -> None:
    broker = gpu_host.start_broker()
    first, second = gpu_host.start_instance("first", visible="3,1"), gpu_host.start_instance("second", visible="1")
    first.call(gpu.create, "model", 0, MIXED, 7)
    second.call(gpu.create, "model", 0, MIXED)
    first.call(instance.publish, "model")
    assert second.call(gpu.acquire_or_load, "model", 8).source == "first"
    assert second.call(gpu.digest, "model") == first.call(gpu.digest, "model")
    assert published_on(broker) == [("first", uuid(3)), ("second", uuid(1))]
    assert gpu_host.cuda.violations() == []


def test_the_broker_lists_its_gpus_and_opens_none_before_it_has_to(gpu_host: GpuHost) -> None:
    gpu_host.cuda.inject(Fault.OUT_OF_MEMORY)
    broker = gpu_host.start_broker()
    eventually(lambda: len(cards(broker)) == GPUS)
    assert [(card.device_id, card.device_index) for card in broker.host().cards] == [(uuid(i), i) for i in range(GPUS)]
    for card in cards(broker).values():
        assert card.device_kind == weight_set_pb2.DEVICE_KIND_CUDA
        assert card.state == resources_pb2.Card.STATE_READY
        assert card.soc == "Double of a GPU"
        assert not card.receiver_pids


def test_a_gpu_that_does_not_open_is_reported_with_the_drivers_words_and_tried_again(gpu_host: GpuHost) -> None:
    broker = gpu_host.start_broker()
    first = gpu_host.start_instance("first")
    first.call(gpu.create, "model", 0, MIXED, 7)
    gpu_host.cuda.inject(Fault.OPEN_REFUSED)
    refused = first.call(instance.publish, "model")
    assert refused.error == "PublishRefused"
    assert "CUDA_ERROR_MAP_FAILED" in refused.message
    wait_until_idle(broker)
    gpu_host.cuda.clear(Fault.OPEN_REFUSED)
    assert first.call(instance.publish, "model").error == ""
    assert gpu_host.cuda.violations() == []


def test_memory_that_has_no_handle_is_refused_with_the_reason_and_the_fix(gpu_host: GpuHost) -> None:
    gpu_host.start_broker()
    first = gpu_host.start_instance("first")
    gpu_host.cuda.inject(Fault.MAPPED_MEMORY)
    first.call(gpu.create, "model", 0, MIXED, 7)
    refused = first.call(instance.publish, "model")
    assert refused.error == "PublishRefused"
    assert "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False" in refused.message
    assert "a.weight" in refused.message


def test_a_copy_past_its_deadline_costs_its_process_and_nothing_else(gpu_host: GpuHost) -> None:
    broker = gpu_host.start_broker()
    first, second = gpu_host.start_instance("first"), gpu_host.start_instance("second")
    first.call(gpu.create, "model", 0, MIXED, 7)
    second.call(gpu.create, "model", 0, MIXED)
    first.call(instance.publish, "model")  # the process that copies is there from now on
    gpu_host.cuda.inject(Fault.COPY_HANGS)
    acquiring = second.begin(instance.acquire, "model", timeout=20.0)
    eventually(lambda: len(gpu_host.cuda.opened()) == 2)
    (process,) = cards(broker)[uuid(0)].receiver_pids
    late = acquiring(60.0)
    assert late.error == "AcquireTimeout", late
    assert (late.touched, late.quiesced) == (True, True)
    assert gpu_host.cuda.opened() == []
    assert not Path("/proc", str(process)).exists()
    gpu_host.cuda.clear(Fault.COPY_HANGS)
    assert second.call(instance.acquire, "model").error == ""
    assert second.call(gpu.digest, "model") == first.call(gpu.digest, "model")
    assert published_on(broker) == [("first", uuid(0))]
    assert gpu_host.cuda.violations() == []


def test_a_copy_that_fails_is_a_failed_transfer_and_the_next_one_works(gpu_host: GpuHost) -> None:
    gpu_host.start_broker()
    first, second = gpu_host.start_instance("first"), gpu_host.start_instance("second")
    first.call(gpu.create, "model", 0, MIXED, 7)
    second.call(gpu.create, "model", 0, MIXED)
    first.call(instance.publish, "model")
    gpu_host.cuda.inject(Fault.COPY_FAILS)
    failed = second.call(instance.acquire, "model", wait=False)
    assert failed.error == "TransferFailed", failed
    assert (failed.touched, failed.quiesced) == (True, True)
    assert gpu_host.cuda.opened() == []
    gpu_host.cuda.clear(Fault.COPY_FAILS)
    assert first.call(instance.is_published, "model")


def test_a_publisher_killed_in_the_middle_is_left_for_the_next_source(gpu_host: GpuHost) -> None:
    broker = gpu_host.start_broker()
    first, second, third = (gpu_host.start_instance(name) for name in ("first", "second", "third"))
    first.call(gpu.create, "model", 0, MIXED, 7)
    second.call(gpu.create, "model", 1, MIXED)
    third.call(gpu.create, "model", 2, MIXED, 7)
    first.call(instance.publish, "model")
    third.call(instance.publish, "model")
    gpu_host.cuda.inject(Fault.COPY_HANGS)
    answer = second.begin(instance.acquire, "model", timeout=60.0)  # from the older publication
    eventually(lambda: len(gpu_host.cuda.opened()) == 2)
    assert {name.split("-")[0] for name in gpu_host.cuda.opened()} == {str(first.pid), str(second.pid)}
    first.kill()
    eventually(lambda: published_on(broker) == [("third", uuid(2))])
    gpu_host.cuda.clear(Fault.COPY_HANGS)
    filled = answer(90.0)
    assert (filled.error, filled.source) == ("", "third")
    assert second.call(gpu.digest, "model") == third.call(gpu.digest, "model")
    assert published_on(broker) == [("third", uuid(2))]
    assert gpu_host.cuda.opened() == []


def test_a_retract_returns_when_nobody_has_the_memory_open(gpu_host: GpuHost) -> None:
    gpu_host.start_broker()
    first, second = gpu_host.start_instance("first"), gpu_host.start_instance("second")
    first.call(gpu.create, "model", 0, MIXED, 7)
    second.call(gpu.create, "model", 1, MIXED)
    first.call(instance.publish, "model")
    gpu_host.cuda.inject(Fault.COPY_HANGS)
    acquiring = second.begin(instance.acquire, "model", timeout=30.0)
    eventually(lambda: len(gpu_host.cuda.opened()) == 2)
    retracting = first.begin(instance.retract, "model")
    gpu_host.cuda.clear(Fault.COPY_HANGS)
    assert acquiring(60.0).error == ""
    assert retracting(60.0).error == ""
    first.call(gpu.free, "model")
    assert gpu_host.cuda.violations() == []


def test_publications_of_the_same_memory_share_what_is_opened(gpu_host: GpuHost) -> None:
    broker = gpu_host.start_broker()
    first = gpu_host.start_instance("first")
    first.call(gpu.create, "model", 0, MIXED, 7)
    assert first.call(gpu.regions, "model") == first.call(gpu.regions, "model")
    first.call(instance.publish, "model")
    assert cards(broker)[uuid(0)].region_count == 1
    first.call(instance.retract, "model")
    wait_until_idle(broker)


@pytest.mark.parametrize("enabled", ["auto", "on"])
def test_a_host_without_a_gpu_serves_host_memory_and_complains_only_if_told_that_there_is_one(
    gpu_host: GpuHost, enabled: str
) -> None:
    broker = gpu_host.start_broker(enabled=enabled, CUDA_VISIBLE_DEVICES="")
    if enabled == "on":
        eventually(lambda: "no CUDA-capable device" in broker.host().device_problem)
    else:
        first = gpu_host.start_instance("first")
        first.call(gpu.create, "model", 0, MIXED, 7)
        refused = first.call(instance.publish, "model")
        assert refused.error == "PublishRefused"
        assert "this broker serves: cpu" in refused.message
        assert broker.host().device_problem == ""
        assert "no_gpus" not in broker.log
        assert "gpus_found" not in broker.log
    assert not broker.host().cards


def test_digests_of_the_device_are_those_of_the_host(gpu_host: GpuHost) -> None:
    first, second = gpu_host.start_instance("first"), gpu_host.start_instance("second")
    first.call(gpu.create, "model", 0, MIXED, 7)
    second.call(gpu.create, "model", 1, MIXED, 7)
    found = first.call(gpu.digests, "model")
    assert found == second.call(gpu.digests, "model")
    assert len({*found}) == len(MIXED) - 1  # the tied one has its target's
    second.call(gpu.write, "model", 8)
    assert found != second.call(gpu.digests, "model")
