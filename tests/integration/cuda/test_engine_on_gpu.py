"""An engine loads onto a GPU, on a double of NVIDIA's driver: from disk, from a source, with a driver that fails."""

from __future__ import annotations

import pytest

from doubles.cuda.control import Fault, uuid
from support import gpu_engine as engine
from support.device_host import published_on
from support.gpu_host import GpuHost

pytestmark = pytest.mark.timeout(120)


def test_an_engine_loads_and_publishes_and_the_next_one_is_filled_from_it(gpu_host: GpuHost) -> None:
    broker = gpu_host.start_broker()
    first, second = gpu_host.start_instance("first"), gpu_host.start_instance("second")
    first.call(engine.make, 0)
    second.call(engine.make, 1)
    assert first.call(engine.load) == ("disk", True, "", "")
    assert second.call(engine.load) == ("peer", True, "", "")
    assert second.call(engine.digest) == first.call(engine.digest)
    assert sorted(device for _, device in published_on(broker)) == sorted([uuid(0), uuid(1)])
    assert gpu_host.cuda.violations() == []


def test_weights_that_post_processing_rewrites_come_from_a_copy_in_host_memory(gpu_host: GpuHost) -> None:
    broker = gpu_host.start_broker()
    first, second, third = (gpu_host.start_instance(name) for name in ("first", "second", "third"))
    for gpu, process in enumerate((first, second, third)):
        process.call(engine.make, gpu % 2)
    assert first.call(engine.load, rewrites=True) == ("disk", True, "", "")
    assert second.call(engine.load, rewrites=True) == ("peer", True, "", "")
    first.kill()
    assert third.call(engine.load, rewrites=True, host_copy="never").source == "peer"
    digests = {process.call(engine.digest) for process in (second, third)}
    alone = gpu_host.start_instance("alone")
    alone.call(engine.make, 0)
    alone.call(engine.load)
    assert digests == {alone.call(engine.digest_rewritten)}
    assert second.call(engine.sleep) == (0, 0), "a sleep leaves the copy published"
    assert [device for _, device in published_on(broker)] == ["", ""], "of the second and the last"
    assert gpu_host.cuda.violations() == []


@pytest.mark.parametrize(
    ("host_copy", "is_quantized", "is_published"),
    [("auto", True, True), ("auto", False, False), ("always", False, True), ("never", True, False)],
)
def test_the_option_and_the_engines_configuration_decide_whether_there_is_a_copy(
    gpu_host: GpuHost, host_copy: str, is_quantized: bool, is_published: bool
) -> None:
    gpu_host.start_broker()
    first = gpu_host.start_instance("first")
    first.call(engine.make, 0)
    loaded = first.call(engine.load, rewrites=True, host_copy=host_copy, is_quantized=is_quantized)
    assert loaded.is_published is is_published
    assert ("post-processing rewrote" in loaded.not_published) is not is_published


def test_an_engine_whose_weights_come_from_a_gpu_and_are_rewritten_publishes_a_copy_of_its_own(
    gpu_host: GpuHost,
) -> None:
    broker = gpu_host.start_broker()
    first, second = gpu_host.start_instance("first"), gpu_host.start_instance("second")
    first.call(engine.make, 0)
    second.call(engine.make, 1)
    assert first.call(engine.load) == ("disk", True, "", "")
    assert second.call(engine.load, rewrites=True) == ("peer", True, "", "")
    assert sorted(device for _, device in published_on(broker)) == ["", uuid(0)]


@pytest.mark.parametrize(("scribble", "republished"), [(False, 1), (True, 0)])
def test_a_sleep_retracts_what_is_published_in_place_and_waking_up_publishes_what_has_not_changed(
    gpu_host: GpuHost, scribble: bool, republished: int
) -> None:
    broker = gpu_host.start_broker()
    first = gpu_host.start_instance("first")
    first.call(engine.make, 0)
    assert first.call(engine.load).is_published
    assert first.call(engine.sleep, scribble=scribble) == (1, republished)
    assert len(published_on(broker)) == republished


@pytest.mark.parametrize("fault", [Fault.OUT_OF_MEMORY, Fault.OPEN_REFUSED, Fault.MAPPED_MEMORY])
def test_a_driver_that_fails_costs_the_publication_and_not_the_load(gpu_host: GpuHost, fault: Fault) -> None:
    gpu_host.start_broker()
    first, whole = gpu_host.start_instance("first"), gpu_host.start_instance("whole")
    whole.call(engine.make, 0)
    if fault is Fault.MAPPED_MEMORY:
        gpu_host.cuda.inject(fault)
    first.call(engine.make, 0)
    gpu_host.cuda.inject(fault)
    loaded = first.call(engine.load)
    assert (loaded.source, loaded.is_published) == ("disk", False)
    assert loaded.not_published
    gpu_host.cuda.clear(fault)
    assert whole.call(engine.load).is_published
    assert first.call(engine.digest) == whole.call(engine.digest)


def test_without_a_broker_an_engine_loads_as_ever(gpu_host: GpuHost) -> None:
    alone = gpu_host.start_instance("alone")
    alone.call(engine.make, 0)
    loaded = alone.call(engine.load)
    assert (loaded.source, loaded.is_published) == ("disk", False)
    assert loaded.acquire_error
