"""GPUs and processes that the driver sets apart: containers, partitioned GPUs, GPUs for one process."""

from __future__ import annotations

import os

import pytest

from doubles.cuda.control import Fault, instance_uuid, uuid
from support import device_instance as instance
from support import gpu_instance as gpu
from support.device_host import published_on, wait_until_idle
from support.device_instance import Tensor
from support.gpu_host import GpuHost

pytestmark = pytest.mark.timeout(120)

TENSORS = [Tensor("a.weight", (512, 512)), Tensor("b.bias", (77,), "float32")]
NEW_PID_NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="a pid namespace needs root")


@needs_root
def test_a_publisher_in_another_pid_namespace_is_refused_with_the_reason_and_the_fix(gpu_host: GpuHost) -> None:
    broker = gpu_host.start_broker()
    contained = gpu_host.start_instance("contained", prefix=NEW_PID_NAMESPACE)
    contained.call(gpu.create, "model", 0, TENSORS, 7)
    refused = contained.call(instance.publish, "model")
    assert refused.error == "PublishRefused"
    assert "CUDA_ERROR_INVALID_CONTEXT" in refused.message
    assert "in different pid namespaces" in refused.message
    assert "--pid=host" in refused.message
    assert "--ipc=host" in refused.message
    wait_until_idle(broker)
    assert gpu_host.cuda.opened() == []


@needs_root
def test_a_receiver_in_another_pid_namespace_gets_nothing_and_keeps_the_source_from_no_other(gpu_host: GpuHost) -> None:
    broker = gpu_host.start_broker()
    source, outside = gpu_host.start_instance("source"), gpu_host.start_instance("outside")
    contained = gpu_host.start_instance("contained", prefix=NEW_PID_NAMESPACE)
    source.call(gpu.create, "model", 0, TENSORS, 7)
    contained.call(gpu.create, "model", 0, TENSORS)
    outside.call(gpu.create, "model", 1, TENSORS)
    source.call(instance.publish, "model")
    failed = contained.call(instance.acquire, "model", wait=False)
    assert failed.error == "TransferFailed", failed
    assert (failed.touched, failed.quiesced) == (False, True)
    assert "in different pid namespaces" in failed.message
    assert outside.call(instance.acquire, "model").source == "source"
    assert outside.call(gpu.digest, "model") == source.call(gpu.digest, "model")
    assert ("source", uuid(0)) in published_on(broker)
    assert gpu_host.cuda.violations() == []


def test_an_instance_of_a_partitioned_gpu_has_the_name_that_people_see(gpu_host: GpuHost) -> None:
    gpu_host.cuda.partition(0)
    broker = gpu_host.start_broker()
    first, second = gpu_host.start_instance("first"), gpu_host.start_instance("second")
    first.call(gpu.create, "model", 0, TENSORS, 7)
    second.call(gpu.create, "model", 0, TENSORS)
    assert first.call(instance.publish, "model").error == ""
    assert published_on(broker) == [("first", instance_uuid(0, 0))]
    assert second.call(instance.acquire, "model").source == "first"
    assert second.call(gpu.digest, "model") == first.call(gpu.digest, "model")
    assert gpu_host.cuda.violations() == []


def test_an_instance_that_the_broker_does_not_see_is_refused_by_name(gpu_host: GpuHost) -> None:
    gpu_host.cuda.partition(0)
    gpu_host.start_broker()
    other = gpu_host.start_instance("other", visible=instance_uuid(0, 1))
    other.call(gpu.create, "model", 0, TENSORS, 7)
    refused = other.call(instance.publish, "model")
    assert refused.error
    assert instance_uuid(0, 1) in refused.message
    assert instance_uuid(0, 0) in refused.message


def test_a_gpu_for_one_process_is_refused_with_the_drivers_words(gpu_host: GpuHost) -> None:
    gpu_host.cuda.inject(Fault.EXCLUSIVE_PROCESS)
    gpu_host.start_broker()
    first = gpu_host.start_instance("first")
    first.call(gpu.create, "model", 0, TENSORS, 7)
    refused = first.call(instance.publish, "model")
    assert refused.error == "PublishRefused"
    assert "CUDA_ERROR_DEVICE_UNAVAILABLE" in refused.message
