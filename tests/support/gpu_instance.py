"""An instance whose tensors are on an emulated GPU: its memory. What it does with its broker is `device_instance`'s."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
from collections.abc import Sequence

import numpy

from support import device_instance
from support.device_instance import ALIGNMENT, Model, Outcome, Tensor
from weight_broker import BrokerError
from weight_broker.drivers import cuda
from weight_broker.memory import describe
from weight_broker.memory.cuda import kind as cuda_kind
from weight_broker.memory.device.describe import DescribedDeviceTensors
from weight_broker.memory.device.tensor import DeviceTensor

SEGMENT_BYTES = 2 << 20
_segments: dict[str, list[tuple[int, int]]] = {}


def create(
    model: str, gpu: int, tensors: Sequence[Tensor], seed: int | None = None, *, segment_bytes: int = 64 << 20
) -> None:
    """Gives the tensors memory, one after the other in segments of at least 2 MiB and at most `segment_bytes`, unless
    one tensor is larger. They have the bytes of `seed`, or zeros."""
    driver = cuda.load()
    groups: list[list[Tensor]] = [[]]
    for one in tensors:
        if not one.alias_of:
            if groups[-1] and _size([*groups[-1], one]) > segment_bytes:
                groups.append([])
            groups[-1].append(one)
    addresses: dict[str, int] = {}
    with driver.on_device(gpu):
        driver.retain_primary_context(gpu)  # as torch does, for as long as the process lives
        for group in groups:
            size = -(-_size(group) // SEGMENT_BYTES) * SEGMENT_BYTES
            base = driver.malloc(size)
            _segments.setdefault(model, []).append((base, size))
            at = base + ALIGNMENT  # the first is not at the beginning
            for one in group:
                addresses[one.name] = at
                at += _padded(one)
    made = {one.name: _tensor(one, addresses[one.alias_of or one.name], gpu) for one in tensors}
    base, size = _segments[model][0]
    device_instance.adopt(model, Model(gpu, base, size, made))
    write(model, seed)


def write(model: str, seed: int | None) -> None:
    """Writes the bytes of `seed` or zeros into all of the model's memory."""
    driver = cuda.load()
    tensors = device_instance.model_of(model).tensors
    gpu = device_instance.model_of(model).card
    with driver.on_device(gpu):
        for base, size in _segments[model]:
            _write(driver, base, bytes(size))
        for index, name in enumerate(sorted(tensors)):
            tensor = tensors[name]
            if seed is not None and tensor.storage_bytes:
                _write(driver, tensor.address, numpy.random.default_rng(seed + index).bytes(tensor.storage_bytes))


def digest(model: str) -> str:
    """Of everything in the model's segments: what lies between the tensors too."""
    driver = cuda.load()
    found = hashlib.blake2b(digest_size=16)
    gpu = device_instance.model_of(model).card
    with driver.on_device(gpu):
        for base, size in _segments[model]:
            host = ctypes.create_string_buffer(size)
            driver.read(ctypes.addressof(host), base, size)
            found.update(memoryview(host))
    return found.hexdigest()


def digest_of_tensors(model: str) -> list[str]:
    """Of each tensor by name, wherever it lies."""
    driver = cuda.load()
    found = []
    tensors = device_instance.model_of(model).tensors
    with driver.on_device(device_instance.model_of(model).card):
        for name in sorted(tensors):
            tensor = tensors[name]
            host = ctypes.create_string_buffer(max(tensor.storage_bytes, 1))
            if tensor.storage_bytes:
                driver.read(ctypes.addressof(host), tensor.address, tensor.storage_bytes)
            found.append(hashlib.blake2b(memoryview(host)[: tensor.storage_bytes], digest_size=16).hexdigest())
    return found


def digests(model: str) -> tuple[int, ...]:
    """MULTILINEAR_64 of each tensor, in the layout's order."""
    described = describe(device_instance.model_of(model).tensors)
    assert isinstance(described, DescribedDeviceTensors)
    return cuda_kind.KIND.digests(described).values


def regions(model: str) -> list[tuple[str, int, str]]:
    """(id, bytes, GPU) of what an export of the model shares."""
    described = describe(device_instance.model_of(model).tensors)
    assert isinstance(described, DescribedDeviceTensors)
    with_regions = cuda_kind.KIND.export(described)
    return [(one.region_id, one.size_bytes, one.device_id) for one in with_regions.regions]


def acquire_or_load(model: str, seed: int, *, timeout: float = 60.0) -> Outcome:
    """Fills the model from a peer, or "from disk" with the bytes of `seed`; a source afterwards."""
    mine = device_instance.model_of(model)
    try:
        report = device_instance.client().acquire_or_load(
            device_instance.key_of(model), mine.tensors, lambda: write(model, seed), timeout=timeout
        )
    except BrokerError as error:
        return Outcome(type(error).__name__, error.message, error.touched, error.quiesced)
    mine.publication = report.publication
    if report.report is None:
        return Outcome(source="disk", message=report.acquire_error or report.publish_error or "")
    return Outcome(
        source=report.report.source_instance_name, data_plane=report.report.data_plane, path=report.report.path
    )


def free(model: str) -> None:
    """Frees the model's memory; it is a violation if somebody has it open."""
    driver = cuda.load()
    gpu = device_instance.model_of(model).card
    with driver.on_device(gpu):
        for base, _ in _segments.pop(model):
            driver.free(base)


def _write(driver: cuda.Cuda, address: int, content: bytes) -> None:
    host = ctypes.create_string_buffer(content, len(content))
    driver.write(address, ctypes.addressof(host), len(content))


def _padded(one: Tensor) -> int:
    return -(-one.size_bytes // ALIGNMENT) * ALIGNMENT


def _size(tensors: Sequence[Tensor]) -> int:
    return ALIGNMENT + sum(map(_padded, tensors))


def _tensor(one: Tensor, address: int, gpu: int) -> DeviceTensor:
    steps = itertools.accumulate(reversed(one.shape[1:]), lambda count, size: count * size, initial=1)
    stride = tuple(reversed(list(steps))) if one.shape else ()
    return DeviceTensor(
        address if one.size_bytes else 0, one.dtype, one.shape, stride, one.size_bytes, gpu, device_kind="cuda"
    )
