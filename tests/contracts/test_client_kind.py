"""Every kind of memory that a client knows, and one that only this test knows: the same suite for all of them.

The drivers are objects; tests/integration and tests/gpu use real ones or doubles of the libraries.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from support.device_driver import Acl, Memory
from weight_broker.digest import ContentDigests
from weight_broker.drivers import acl as acl_module
from weight_broker.drivers import cuda as cuda_module
from weight_broker.drivers.acl import AclUnavailable
from weight_broker.drivers.cuda import Cuda, CudaError
from weight_broker.drivers.error import DriverError
from weight_broker.errors import BrokerError, InvalidArgument, PublishRefused
from weight_broker.kinds import TRAITS, MemoryKind
from weight_broker.memory import describe
from weight_broker.memory import kind as kinds
from weight_broker.memory.device.describe import DescribedDeviceTensors
from weight_broker.memory.device.digest import HostDigester, tensor_digests
from weight_broker.memory.device.host_copies import DriverCopies
from weight_broker.memory.device.kind import DeviceKind
from weight_broker.memory.from_host import destination as destination_of
from weight_broker.memory.host.export import SharedWeights
from weight_broker.memory.kind import DeadlinePassed, Kind, Terms, kind_of
from weight_broker.memory.policy import StagingPolicy
from weight_broker.memory.to_host import share_copy
from weight_broker.v1 import weight_broker_service_pb2 as pb
from weight_broker.wire import device_kind_to_wire, digests_to_wire, placements_to_wire

TEST_KIND = "abacus"
MODULE = "tests_abacus"
DIRECT = Terms(staging=StagingPolicy.DIRECT)


class Gpu(Cuda):
    """NVIDIA's driver as an object: device memory is this process's own."""

    def __init__(self) -> None:
        self.is_broken = False

    @contextmanager
    def on_device(self, device: int) -> Iterator[None]:
        yield

    def synchronize(self) -> None:
        if self.is_broken:
            raise CudaError("cuCtxSynchronize", 700, "CUDA_ERROR_ILLEGAL_ADDRESS")

    def device_id(self, device: int) -> str:
        return f"GPU-{device}"

    def is_ipc_capable(self, address: int) -> bool:
        return True

    def allocation_of(self, address: int) -> tuple[int, int]:
        return address & ~4095, 4096

    def ipc_handle(self, address: int) -> bytes:
        return address.to_bytes(64, "big")

    def read(self, host: int, address: int, size: int) -> None:
        ctypes.memmove(host, address, size)

    def write(self, address: int, host: int, size: int) -> None:
        ctypes.memmove(address, host, size)


class Abacus(DeviceKind):
    """A kind that no version knows: a folder of its own would hold this class."""

    name = TEST_KIND
    framework = SimpleNamespace()  # torch knows nothing of an abacus

    def __init__(self) -> None:
        self.is_broken = False

    def export(self, tensors: DescribedDeviceTensors) -> Any:
        places = tuple((0, 0) for _ in tensors.tensors)
        return SimpleNamespace(regions=(), placements=places, close=lambda: None)

    def identity(self, tensors: DescribedDeviceTensors) -> str:
        return f"{TEST_KIND}:{tensors.device_index}"

    def host_copies(self, tensors: DescribedDeviceTensors) -> DriverCopies:
        return DriverCopies(nullcontext, self._check, ctypes.memmove, ctypes.memmove)

    def _check(self) -> None:
        if self.is_broken:
            raise DriverError("move", 1, "a bead is stuck")

    def digests(
        self, tensors: DescribedDeviceTensors, deadline: float | None = None, *, sampled: bool = False
    ) -> ContentDigests:
        if self.is_broken:
            raise PublishRefused("a bead is stuck")
        return tensor_digests(tensors, HostDigester(ctypes.memmove), deadline, sampled=sampled)


@dataclass
class Scene:
    """A kind, a tensor in such memory, and a driver that can be broken."""

    name: str
    tensors: dict[str, Any]
    write: Callable[[int], object]
    break_driver: Callable[[], object] | None

    @property
    def kind(self) -> Kind[Any]:
        return kind_of(self.name)


def scene_of(name: str, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """Makes the kind work here."""
    if not TRAITS[name].has_devices:
        array = np.ones(4096, np.uint8)
        return Scene(name, {"w": array}, array.fill, None)
    memory = Memory(1)
    tensor = replace(memory.tensor(), device_kind=name)
    break_driver: Callable[[], object]
    if name == TEST_KIND:
        break_driver = lambda: setattr(sys.modules[MODULE].KIND, "is_broken", True)  # noqa: E731
    elif "cuda_allocation" in TRAITS[name].handles:
        gpu = Gpu()
        monkeypatch.setattr(cuda_module, "load", lambda *_: gpu)
        break_driver = lambda: setattr(gpu, "is_broken", True)  # noqa: E731
    else:
        acl = Acl()
        monkeypatch.setattr(acl_module, "load", lambda *_: acl)

        def lose_library() -> None:
            def missing(*_: object) -> None:
                raise AclUnavailable("libascendcl.so", 0, "not here")

            monkeypatch.setattr(acl_module, "load", missing)

        break_driver = lose_library
    return Scene(name, {"w": tensor}, memory.fill, break_driver)


@pytest.fixture(params=[*TRAITS, TEST_KIND])
def scene(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Scene:
    name = request.param
    if name == TEST_KIND:
        traits = replace(TRAITS[MemoryKind.NPU], wire_number=99, can_be_staged=False, handles=())
        monkeypatch.setitem(TRAITS, TEST_KIND, traits)
        monkeypatch.setitem(kinds.MODULES, TEST_KIND, MODULE)
        module: Any = ModuleType(MODULE)
        module.KIND = Abacus()
        monkeypatch.setitem(sys.modules, MODULE, module)
    return scene_of(name, monkeypatch)


def test_every_kind_has_traits_and_a_module() -> None:
    assert set(TRAITS) == set(kinds.MODULES)


def test_tensors_are_described_by_their_own_kind(scene: Scene) -> None:
    described = describe(scene.tensors)
    assert described.device_kind == scene.name
    assert [(spec.name, spec.content_bytes) for spec in described.layout] == [("w", 4096)]
    if TRAITS[scene.name].has_devices:
        with pytest.raises(InvalidArgument, match=r"tensors\.device"):
            described.require_host_memory()
    else:
        described.require_host_memory()


def test_tensors_in_memory_of_two_kinds_are_no_weight_set(scene: Scene) -> None:
    other = np.ones(3) if TRAITS[scene.name].has_devices else replace(Memory().tensor(), device_kind=MemoryKind.CUDA)
    with pytest.raises(InvalidArgument, match=r"tensors\[(w|x)\]"):
        describe({**scene.tensors, "x": other})


def test_digests_are_those_of_the_content(scene: Scene) -> None:
    described = describe(scene.tensors)
    first = scene.kind.digests(described)
    assert scene.kind.digests(described) == first
    scene.write(2)
    assert scene.kind.digests(described).values != first.values


def test_digesting_ends_at_the_deadline(scene: Scene) -> None:
    with pytest.raises(DeadlinePassed):
        scene.kind.digests(describe(scene.tensors), time.monotonic() - 1)


def test_a_driver_that_fails_is_an_error_of_the_brokers(scene: Scene) -> None:
    if scene.break_driver is None:
        pytest.skip("this memory has no driver")
    described = describe(scene.tensors)
    scene.break_driver()
    with pytest.raises(BrokerError):
        scene.kind.digests(described)
    with pytest.raises(PublishRefused):
        scene.kind.share(described, DIRECT, time.monotonic() + 10)


def test_shared_memory_says_what_is_in_it_and_can_be_closed_twice(scene: Scene) -> None:
    described = describe(scene.tensors)
    shared = scene.kind.share(described, DIRECT, time.monotonic() + 10)
    assert shared.layout == described.layout
    assert len(shared.placements) == 1
    assert shared.digests[0].values
    assert shared.is_served
    assert shared.needs_retraction is (scene.kind.prepared_bytes(described.layout) == 0)
    assert [region.device_kind for region in shared.regions("batch")] in ([], [device_kind_to_wire(scene.name)])
    shared.close()
    shared.close()


def test_a_copy_in_host_memory_stays_as_it_was_and_fills_the_tensors_again(scene: Scene) -> None:
    described = describe(scene.tensors)
    shared = share_copy(described, Terms(), time.monotonic() + 10)
    assert not shared.needs_retraction
    assert isinstance(shared, SharedWeights)
    was = scene.kind.digests(described)
    scene.write(2)
    destination = destination_of(described, Terms())
    granted = pb.Granted(
        regions=shared.regions("batch"),
        digests=[digests_to_wire(digests) for digests in shared.digests],
        placements=placements_to_wire(shared.placements),
    )
    received = destination.take(granted, lambda index: os.dup(shared.descriptors[index]), time.monotonic() + 10)
    assert received is not None
    assert scene.kind.digests(described) == was
    kept = destination.keep()
    assert isinstance(kept, SharedWeights)
    for one in (destination, kept, shared):
        one.close()


def test_a_driver_that_fails_makes_no_copy_in_host_memory(scene: Scene) -> None:
    if scene.break_driver is None:
        pytest.skip("this memory has no driver")
    described = describe(scene.tensors)
    scene.break_driver()
    with pytest.raises(PublishRefused):
        share_copy(described, Terms(), time.monotonic() + 10)


def test_a_copy_in_host_memory_ends_at_the_deadline(scene: Scene) -> None:
    with pytest.raises(PublishRefused, match="deadline"):
        share_copy(describe(scene.tensors), Terms(), time.monotonic() - 1)


def test_sharing_ends_at_the_deadline(scene: Scene) -> None:
    with pytest.raises(PublishRefused, match="deadline"):
        scene.kind.share(describe(scene.tensors), DIRECT, time.monotonic() - 1)


def test_a_destination_names_its_kind_and_has_the_tensors_layout(scene: Scene) -> None:
    described = describe(scene.tensors)
    destination = scene.kind.destination(described, DIRECT)
    request, session = pb.AcquireRequest(), SimpleNamespace()
    deadline = time.monotonic() + 60
    destination.fill_request(request, session, deadline)  # type: ignore[arg-type]  # only what is staged needs one
    assert request.device_kind == device_kind_to_wire(scene.name)
    assert (request.device_id != "") is TRAITS[scene.name].has_devices
    assert (destination.grace_seconds > 0) is TRAITS[scene.name].broker_copies
    assert destination.layout == described.layout
    destination.close()
    destination.close()


def test_a_kind_that_cannot_be_staged_says_so(scene: Scene) -> None:
    if TRAITS[scene.name].can_be_staged or not TRAITS[scene.name].has_devices:
        pytest.skip("it can be staged, or never has to be")
    with pytest.raises(PublishRefused, match=f"{scene.name} memory cannot be copied"):
        scene.kind.share(describe(scene.tensors), Terms(staging=StagingPolicy.STAGED), time.monotonic() + 10)


def test_memory_of_an_unknown_kind_is_refused_by_its_name() -> None:
    tensors: Mapping[str, object] = {"w": replace(Memory().tensor(), device_kind="tpu")}
    with pytest.raises(InvalidArgument, match="'tpu'"):
        describe(tensors)
