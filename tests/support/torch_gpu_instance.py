"""An instance whose tensors are torch's, on a real GPU. Called through `CalledProcess`."""

from __future__ import annotations

import hashlib
import os

import torch

from support.device_instance import Outcome
from weight_broker import BrokerClient, BrokerError, WeightSetKey
from weight_broker.drivers import cuda
from weight_broker.memory import describe
from weight_broker.memory.cuda import kind as cuda_kind
from weight_broker.memory.device.describe import DescribedDeviceTensors
from weight_broker.memory.device.digest import HostDigester, tensor_digests
from weight_broker.transfers.publication import Publication

_tensors: dict[str, dict[str, torch.Tensor]] = {}
_publications: dict[str, Publication] = {}
_clients: list[BrokerClient] = []


def create(model: str, gpu: int = 0, seed: int | None = None) -> None:
    """Tensors of mixed sizes, types and layouts, with the bytes of `seed` or zeros."""
    torch.cuda.set_device(gpu)

    def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        made = torch.zeros(shape, dtype=dtype, device="cuda")
        if seed is not None and made.numel():
            made.view(torch.uint8).random_(0, 256) if made.dim() else made.fill_(seed)
        return made

    torch.manual_seed(seed or 0)
    big = make(4096, 8192)
    _tensors[model] = {
        "big": big,
        "tied": big,
        "view": make(64, 512)[16:32],
        "transposed": make(700, 333, dtype=torch.float16).t(),
        "bias": make(77, dtype=torch.float32),
        "scale": make(dtype=torch.float32),
        "empty": make(0, 4),
        "int8": make(3, 5, dtype=torch.int8),
        **{f"layer.{index}": make(index * 97 + 1, dtype=torch.int8) for index in range(400)},
    }


def digest(model: str) -> str:
    """Of the bytes of all tensors in their logical order."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(_tensors[model].items()):
        content = tensor.detach().cpu().contiguous()
        found.update(name.encode())
        found.update(content.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def publish(model: str) -> Outcome:
    """Offers the model."""
    try:
        _publications[model] = _client().publish(_key(model), _tensors[model], timeout=60)
    except BrokerError as error:
        return Outcome(type(error).__name__, error.message)
    return Outcome()


def retract(model: str) -> None:
    """Withdraws the model, and lets torch give its memory back."""
    _publications.pop(model).retract(60)
    _tensors.pop(model)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def acquire(model: str, timeout: float = 60.0) -> Outcome:
    """Fills the model."""
    try:
        report = _client().acquire(_key(model), _tensors[model], timeout=timeout)
    except BrokerError as error:
        return Outcome(type(error).__name__, error.message, error.touched, error.quiesced)
    return Outcome(source=report.source_instance_name, data_plane=report.data_plane, path=report.path)


def identity(gpu: int = 0) -> tuple[str, str]:
    """By the driver and by torch."""
    return cuda.load().device_id(gpu), f"GPU-{torch.cuda.get_device_properties(gpu).uuid}"


def digests(model: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """MULTILINEAR_64 of each tensor: computed on the GPU, and of the same bytes on the processor."""
    described = describe(_tensors[model])
    assert isinstance(described, DescribedDeviceTensors)
    driver = cuda.load()
    with driver.on_device(described.device_index):
        by_host = tensor_digests(described, HostDigester(driver.read), None).values
    return cuda_kind.KIND.digests(described).values, by_host


def missing_functions() -> list[str]:
    """What is called and this driver does not have."""
    driver = cuda.load()
    missing = []
    for name in cuda.ARGUMENTS:
        try:
            driver._function(name)
        except cuda.CudaUnavailable:
            missing.append(name)
    return missing


def _key(model: str) -> WeightSetKey:
    return WeightSetKey(model, revision="1")


def _client() -> BrokerClient:
    if not _clients:
        _clients.append(BrokerClient(name=os.environ.get("INSTANCE_NAME", "")))
    return _clients[0]
