"""An engine that loads a model onto an emulated GPU. torch has no GPU here: its tensors have the addresses of the
double's memory, and torch computes digests on the processor from bytes that the double reads."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import Mock, patch

import numpy
import torch
from torch import nn

from weight_broker import WeightSetKey
from weight_broker.drivers import cuda
from weight_broker.integrations.engine import published
from weight_broker.integrations.engine.engine import Engine
from weight_broker.integrations.engine.load import Load
from weight_broker.integrations.engine.options import Options
from weight_broker.memory.cuda import kind as cuda_kind
from weight_broker.memory.cuda import torch as cuda_torch
from weight_broker.memory.device.digest import TorchDigester

SHAPES = {"embedding": (512, 1024), "layer.weight": (300, 700), "layer.scale": (77,)}
MEMORY_BYTES = 4 << 20
_models: list[nn.Module] = []
_loads: list[Load] = []
_contexts: list[int] = []


class GpuTensor(torch.Tensor):
    """A tensor whose memory is the double's."""

    address = 0
    gpu = 0

    device: Any = property(lambda self: torch.device("cuda", self.gpu))

    def data_ptr(self) -> int:
        """An address that the processor cannot read."""
        return self.address


class Loaded(NamedTuple):
    """What a load says of itself."""

    source: str
    is_published: bool
    acquire_error: str
    not_published: str


class Small(Engine):
    """An engine with a small model."""

    logger = logging.getLogger("weight_broker.small")
    model = "model"
    platform = "cuda"

    def make_key(self, options: Options) -> WeightSetKey:
        return WeightSetKey("model")

    def ranks(self, key: WeightSetKey) -> None:
        return None

    def load_weights(self, model: nn.Module) -> None:
        """The same bytes in every process."""
        driver = cuda.load()
        with driver.in_context(_contexts[-1]):
            for number, (_, tensor) in enumerate(sorted(model.named_buffers())):
                content = numpy.random.default_rng(number).bytes(tensor.numel() * tensor.element_size())
                host = ctypes.create_string_buffer(content, len(content))
                driver.write(tensor.data_ptr(), ctypes.addressof(host), len(content))

    def watch(self, model: nn.Module) -> None:
        pass


def make(gpu: int) -> None:
    """Makes the model, without weights."""
    driver = cuda.load()
    none: list[object] = []
    nothing = {"synchronize": Mock(), "current_stream": Mock(return_value=0), "segments": Mock(return_value=none)}
    patch.multiple(cuda_torch, **nothing).start()
    patch.object(cuda_kind, "TorchDigester", partial(_on_processor, driver)).start()
    _contexts.append(driver.retain_primary_context(gpu))
    model = nn.Module()
    with driver.in_context(_contexts[-1]):
        base = driver.malloc(MEMORY_BYTES)
    for name, shape in SHAPES.items():
        tensor = torch.empty(shape, dtype=torch.bfloat16).as_subclass(GpuTensor)
        tensor.address, tensor.gpu = base, gpu
        base += tensor.numel() * tensor.element_size()
        model.register_buffer(name.replace(".", "_"), tensor)
    _models.append(model)


def load(*, rewrites: bool = False, host_copy: str = "auto", is_quantized: bool = True) -> Loaded:
    """Loads the weights as an engine does, whose post-processing `rewrites` them; whether the engine's configuration
    tells, `is_quantized` says."""
    [model] = _models
    directory = os.environ["WEIGHT_BROKER_RUNTIME_DIRECTORY"]
    engine = Small()
    engine.rewrites_weights = rewrites and is_quantized
    load = Load(Options(runtime_directory=directory, timeout=60, host_copy=host_copy), engine)
    _loads.append(load)
    load.prepare()
    load.weights(model)
    if rewrites:
        _rewrite(model)
    load.finish(model)
    report = load.report
    return Loaded(report.source, bool(report.publication_id), report.acquire_error, report.not_published)


def _rewrite(model: nn.Module) -> None:
    """Post-processing that packs the weights where they are: every bit of them follows from what was loaded."""
    driver = cuda.load()
    with driver.in_context(_contexts[-1]):
        for tensor in model.buffers():
            size = tensor.numel() * tensor.element_size()
            host = ctypes.create_string_buffer(size)
            driver.read(ctypes.addressof(host), tensor.data_ptr(), size)
            packed = ctypes.create_string_buffer(bytes(255 - byte for byte in host.raw), size)
            driver.write(tensor.data_ptr(), ctypes.addressof(packed), size)


def sleep(*, scribble: bool = False) -> tuple[int, int]:
    """Sleeps and wakes up, with other weights if it is to `scribble`: how many publications were retracted, and how
    many followed."""
    [model] = _models
    ended = published.retract("the engine goes to sleep", for_sleep=True)
    if scribble:
        driver = cuda.load()
        with driver.in_context(_contexts[-1]):
            driver.write(next(model.buffers()).data_ptr(), ctypes.addressof(ctypes.create_string_buffer(64)), 64)
    return ended, published.republish()


def digest() -> str:
    """Of the model's bytes on the GPU."""
    [model] = _models
    driver, found = cuda.load(), hashlib.blake2b(digest_size=16)
    with driver.in_context(_contexts[-1]):
        for _, tensor in sorted(model.named_buffers()):
            host = ctypes.create_string_buffer(tensor.numel() * tensor.element_size())
            driver.read(ctypes.addressof(host), tensor.data_ptr(), len(host))
            found.update(host)
    return found.hexdigest()


def digest_rewritten() -> str:
    """Of what post-processing would make of the model's bytes."""
    [model] = _models
    _rewrite(model)
    return digest()


def _on_processor(driver: cuda.Cuda, device: str, copy: object, synchronize: Callable[[], object]) -> TorchDigester:
    return TorchDigester("cpu", driver.read, synchronize)
