"""On a real GPU: two processes with torch tensors, the real broker, NVIDIA's own driver."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from support import torch_gpu_instance as instance
from support.broker_process import BrokerProcess
from support.card_process import CalledProcess
from support.device_host import cards, published_on, wait_until_idle

pytestmark = pytest.mark.timeout(300)

Start = Callable[..., CalledProcess]


@pytest.mark.parametrize("destination", [0, 1], ids=["the same GPU", "another GPU"])
def test_the_second_instance_is_filled_from_the_first_bit_for_bit(
    broker: BrokerProcess, start_instance: Start, destination: int
) -> None:
    if destination >= torch.cuda.device_count():
        pytest.skip("needs a second GPU")
    first, second = start_instance("first"), start_instance("second")
    first.call(instance.create, "model", 0, 7)
    second.call(instance.create, "model", destination)
    assert first.call(instance.publish, "model").error == ""
    filled = second.call(instance.acquire, "model")
    assert (filled.error, filled.source, filled.data_plane) == ("", "first", "local")
    assert second.call(instance.digest, "model") == first.call(instance.digest, "model")
    first.call(instance.retract, "model")
    wait_until_idle(broker)


def test_a_gpu_is_named_by_its_uuid_by_the_driver_by_torch_and_by_the_broker(
    broker: BrokerProcess, start_instance: Start
) -> None:
    one = start_instance("one")
    by_driver, by_torch = one.call(instance.identity)
    assert by_driver == by_torch
    one.call(instance.create, "model", 0, 7)
    one.call(instance.publish, "model")
    assert published_on(broker) == [("one", by_driver)]
    assert by_driver in cards(broker)


def test_digests_of_the_gpu_are_those_of_the_host(start_instance: Start) -> None:
    one = start_instance("one")
    one.call(instance.create, "model", 0, 7)
    by_gpu, by_host = one.call(instance.digests, "model")
    assert by_gpu == by_host
    assert len(set(by_gpu)) > 400


def test_the_driver_has_every_function_that_is_called(start_instance: Start) -> None:
    assert start_instance("one").call(instance.missing_functions) == []


def test_expandable_segments_are_refused_with_the_fix(broker: BrokerProcess, start_instance: Start) -> None:
    one = start_instance("one", PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True")
    one.call(instance.create, "model", 0, 7)
    refused = one.call(instance.publish, "model")
    assert refused.error == "PublishRefused"
    assert "is in an expandable segment" in refused.message
    assert "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False" in refused.message
    wait_until_idle(broker)


def test_a_source_that_was_killed_is_none_and_the_next_one_is_used(
    broker: BrokerProcess, start_instance: Start
) -> None:
    first, second, third = (start_instance(name) for name in ("first", "second", "third"))
    first.call(instance.create, "model", 0, 7)
    third.call(instance.create, "model", 0, 7)
    second.call(instance.create, "model", 0)
    first.call(instance.publish, "model")
    first.kill()
    third.call(instance.publish, "model")
    assert second.call(instance.acquire, "model").source == "third"
    assert second.call(instance.digest, "model") == third.call(instance.digest, "model")
