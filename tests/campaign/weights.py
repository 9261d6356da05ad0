"""The models of a campaign, and the memory that they fill: arrays, or allocations on a card of an emulated Ascend host.

A model's bytes follow from its name, so that a checksum tells which bytes arrived.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import os
import random
from collections.abc import Mapping
from functools import cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from weight_broker.key import WeightSetKey

ITEM_BYTES = 2
MEMORY_FILE = "/memfd:weight-broker"
MODELS: Mapping[str, Mapping[str, int]] = {
    "tiny": {"bias": 6, "weight": 2994},
    "small": {"embedding": 1 << 20, "head": (1 << 20) + 2},
    "large": {"layers.0": 3 << 20, "layers.1": 3 << 20, "layers.2": 2 << 20},
}
"""Of each model: the bytes of its tensors of float16."""


def key_of(model: str) -> WeightSetKey:
    return WeightSetKey(model, revision="campaign", dtype="float16")


@cache
def content(model: str) -> Mapping[str, bytes]:
    """What a load from disk reads."""
    return {name: _pattern(f"{model}/{name}", size) for name, size in MODELS[model].items()}


@cache
def blank(model: str) -> Mapping[str, bytes]:
    """What tensors hold before they are filled: other bytes for each model, and none of its content."""
    return {name: _pattern(f"blank/{model}/{name}", size) for name, size in MODELS[model].items()}


def checksum(tensors: Mapping[str, bytes | memoryview]) -> str:
    """Digest of names and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name])
    return digest.hexdigest()


@cache
def right(model: str) -> str:
    """The checksum of the content."""
    return checksum(content(model))


@cache
def untouched(model: str) -> str:
    """The checksum of blank tensors."""
    return checksum(blank(model))


def _pattern(seed: str, size: int) -> bytes:
    """Bytes with a prime period, so that what is shifted or swapped differs."""
    period = random.Random(seed).randbytes(min(size, 1_000_003))
    return (period * (size // len(period) + 1))[:size]


class Memory(Protocol):
    """Where a process keeps its tensors."""

    is_shared_in_place: bool
    """Whether a publication is these tensors themselves: they must not change before it is retracted."""

    def tensors(self, model: str) -> Mapping[str, object]:
        """The model's tensors, made on first use."""

    def write(self, model: str, content: Mapping[str, bytes]) -> None: ...

    def checksum(self, model: str) -> str:
        """Of the model's tensors; "" if there are none."""

    def discard(self, model: str) -> None:
        """The next tensors of the model are in other memory."""

    def shared(self) -> int:
        """How many pieces of memory this process has open, mapped or exported for others."""


class HostMemory:
    """NumPy arrays."""

    is_shared_in_place = False

    def __init__(self) -> None:
        self._arrays: dict[str, dict[str, npt.NDArray[Any]]] = {}

    def tensors(self, model: str) -> Mapping[str, object]:
        return self._of(model)

    def write(self, model: str, content: Mapping[str, bytes]) -> None:
        for name, array in self._of(model).items():
            array.view(np.uint8)[:] = np.frombuffer(content[name], np.uint8)

    def checksum(self, model: str) -> str:
        arrays = self._arrays.get(model)
        return checksum_of(arrays) if arrays is not None else ""

    def discard(self, model: str) -> None:
        self._arrays.pop(model, None)

    def shared(self) -> int:
        return memory_files()

    def _of(self, model: str) -> dict[str, npt.NDArray[Any]]:
        if model not in self._arrays:
            sizes = MODELS[model].items()
            self._arrays[model] = {name: np.zeros(size // ITEM_BYTES, np.float16) for name, size in sizes}
        return self._arrays[model]


class CardMemory:
    """Allocations on one card of the CANN double."""

    is_shared_in_place = True

    def __init__(self, card: int) -> None:
        self._card = card
        self._acl = importlib.import_module("support.acl")
        self._instance = importlib.import_module("support.device_instance")
        self._made: dict[str, Any] = {}

    def tensors(self, model: str) -> Mapping[str, object]:
        tensors: Mapping[str, object] = self._of(model).tensors
        return tensors

    def write(self, model: str, content: Mapping[str, bytes]) -> None:
        self._acl.set_device(self._card)
        for name, tensor in self._of(model).tensors.items():
            self._acl.write(tensor.address, content[name])

    def checksum(self, model: str) -> str:
        if model not in self._made:
            return ""
        self._acl.set_device(self._card)
        tensors = self._made[model].tensors
        return checksum({name: self._acl.read(one.address, one.storage_bytes) for name, one in tensors.items()})

    def discard(self, model: str) -> None:
        self._made.pop(model, None)  # the memory stays: a transfer may still write to it

    def shared(self) -> int:
        exports: int = self._instance.exports()
        return memory_files() + exports

    def _of(self, model: str) -> Any:
        if model not in self._made:
            sizes = MODELS[model].items()
            tensors = [self._instance.Tensor(name, (size // ITEM_BYTES,), "float16") for name, size in sizes]
            self._instance.create(model, self._card, tensors)
            self._made[model] = self._instance.model_of(model)
        return self._made[model]


def checksum_of(arrays: Mapping[str, Any]) -> str:
    """Of NumPy arrays by name."""
    return checksum({name: np.ascontiguousarray(arrays[name]).view(np.uint8).data for name in arrays})


def memory_of(kind: str, card: int) -> Memory:
    return HostMemory() if kind == "host" else CardMemory(card)


def memory_files() -> int:
    """Memory files of the client that this process has open or mapped."""
    gc.collect()  # tensors that only exceptions refer to
    with open("/proc/self/maps") as maps:
        count = sum(MEMORY_FILE in line for line in maps)
    for entry in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{entry}").startswith(MEMORY_FILE)
        except FileNotFoundError:
            continue
    return count
