"""Weight sets to measure with, and the plain copies they are compared with."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from benchmarks.harness import Instance

from weight_broker import BrokerClient, WeightSetKey
from weight_broker.demo.checkpoint import model_shape
from weight_broker.memory.host.copying import thread_count
from weight_broker.memory.host.export import SharedWeights
from weight_broker.transfers.exchange import Mapped, Request

Shapes = Mapping[str, tuple[int, ...]]
Tensors = dict[str, torch.Tensor]


def model_shapes(size_bytes: int) -> Shapes:
    """Names and shapes of a Qwen2 model of about this size (bfloat16): a few large tensors, many small ones."""
    return dict(model_shape(size_bytes).tensors())


def equal_shapes(count: int, tensor_bytes: int) -> Shapes:
    """`count` tensors of the same size (bfloat16)."""
    return {f"layers.{index:03}.weight": (tensor_bytes // 2,) for index in range(count)}


def untouched(shapes: Shapes) -> Tensors:
    """Tensors whose memory the kernel has not given out yet (the larger ones)."""
    return {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}


def touched(shapes: Shapes) -> Tensors:
    """Tensors of which every page has been written."""
    tensors = untouched(shapes)
    for tensor in tensors.values():
        tensor.fill_(1.0)
    return tensors


def random_content(shapes: Shapes, seed: int) -> Tensors:
    """Tensors with random bits."""
    generator = torch.Generator().manual_seed(seed)
    tensors = untouched(shapes)
    for tensor in tensors.values():
        tensor.view(torch.int16).random_(-0x8000, 0x7FFF, generator=generator)
    return tensors


def publish_random(instance: Instance, model: str, shapes: Shapes, seed: int = 1) -> None:
    """Makes this instance a source; runs in an instance process."""
    publication = instance.client.publish(WeightSetKey(model), random_content(shapes, seed), timeout=300)
    instance.kept[model] = publication


def size_of(tensors: Tensors) -> int:
    """Bytes."""
    return sum(tensor.nbytes for tensor in tensors.values())


@dataclass(frozen=True, slots=True)
class PlainCopy:
    """The same bytes from the same sealed memory into the same tensors, with nothing around it: the source is mapped
    and its pages are known to this process before the clock starts."""

    memmove: Callable[[], None]
    """One `ctypes.memmove` per tensor, largest first, on as many threads as an acquire uses."""
    torch_copy: Callable[[], None]
    """`Tensor.copy_` of one tensor after the other, with torch's own threads."""
    close: Callable[[], None]


def plain_copy(client: BrokerClient, key: WeightSetKey, tensors: Tensors) -> PlainCopy:
    """Plain copies of a resident weight set into `tensors`."""
    outcome = client._exchange.map(Request(key, keep=True), "torch")
    assert isinstance(outcome, Mapped)
    shared = outcome.shared
    assert isinstance(shared, SharedWeights)
    descriptor, size_bytes = shared.memfds[0]
    mapping = mmap.mmap(descriptor, size_bytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    offsets = {spec.name: offset for spec, (_, offset) in zip(shared.layout, shared.placements, strict=True)}
    pieces = [(tensor.data_ptr(), base + offsets[name], tensor.nbytes) for name, tensor in tensors.items()]
    pieces.sort(key=lambda piece: -piece[2])
    sources = [
        (tensor, torch.frombuffer(mapping, dtype=tensor.dtype, count=tensor.numel(), offset=offsets[name]))
        for name, tensor in tensors.items()
    ]
    threads = ThreadPoolExecutor(thread_count())

    def memmove() -> None:
        for future in [threads.submit(ctypes.memmove, *piece) for piece in pieces]:
            future.result()

    def torch_copy() -> None:
        for tensor, source in sources:
            tensor.copy_(source.view(tensor.shape))

    memmove()
    shared.close()
    return PlainCopy(memmove, torch_copy, threads.shutdown)
