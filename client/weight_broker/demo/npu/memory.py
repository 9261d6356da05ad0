"""A checkpoint's tensors in the memory of an Ascend card, for the demo and for `ascend-check`: allocated, read from
disk, digested. By torch_npu if the caller asks for it, else by Ascend's runtime alone."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from weight_broker.drivers import acl
from weight_broker.drivers.acl import MemcpyKind
from weight_broker.integrations.checkpoint import CheckpointTensor, checkpoint_files, checkpoint_tensors
from weight_broker.memory.device.tensor import DeviceTensor, Segment

FRAMEWORKS = ("acl", "torch_npu")
TYPES = {
    "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I8": "int8", "U8": "uint8", "I16": "int16", "I32": "int32", "I64": "int64",
    "BOOL": "bool",
}  # fmt: skip
"""Element types: safetensors' names and PyTorch's."""
_ALIGNMENT = 512
_SEGMENT_BYTES = 1 << 30
_PAGE_BYTES = 2 << 20
_BUFFER_BYTES = 32 << 20


class CardMemory(Protocol):
    """An instance's weights in the memory of a card."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """The tensors to publish or fill, by name."""

    def load(self) -> None:
        """Reads the checkpoint from disk."""

    def content(self, name: str) -> Iterator[bytes | memoryview]:
        """A tensor's present bytes on the card."""


def checkpoint(model_dir: Path) -> list[CheckpointTensor]:
    """All tensors of a checkpoint. Raises `CheckpointError` if a type is unknown or there are no tensors."""
    from weight_broker.integrations.checkpoint import CheckpointError

    found = [tensor for file in checkpoint_files(model_dir) for tensor in checkpoint_tensors(file)]
    unknown = next((tensor for tensor in found if tensor.dtype not in TYPES), None)
    if unknown is not None:
        raise CheckpointError(f"{unknown.file}: tensor {unknown.name!r} has the unknown type {unknown.dtype}")
    if not found:
        raise CheckpointError(f"{model_dir} has no tensors in its safetensors files")
    return found


def card_memory(framework: str, card: int, tensors: Sequence[CheckpointTensor]) -> CardMemory:
    """Fresh memory for the tensors on a card (an index of this process). Raises `AclError`, or what torch raises."""
    return TorchMemory(card, tensors) if framework == "torch_npu" else AclMemory(card, tensors)


def digest(contents: Iterable[tuple[str, Iterator[bytes | memoryview]]]) -> str:
    """SHA-256 of all tensors' names and bytes, independent of their order."""
    rows = []
    for name, parts in contents:
        state = hashlib.sha256()
        for part in parts:
            state.update(part)
        rows.append(f"{name} {state.hexdigest()}\n")
    return hashlib.sha256("".join(sorted(rows)).encode()).hexdigest()


def file_content(tensor: CheckpointTensor) -> Iterator[memoryview]:
    """A tensor's bytes in its file. Each part is overwritten by the next."""
    buffer = memoryview(bytearray(min(tensor.size_bytes, _BUFFER_BYTES)))
    with tensor.file.open("rb", buffering=0) as stream:
        stream.seek(tensor.begin)
        remaining = tensor.size_bytes
        while remaining:
            count = stream.readinto(buffer[:remaining] if remaining < len(buffer) else buffer)
            if not count:
                raise OSError(f"{tensor.file} ended before the tensor did; write the checkpoint again")
            remaining -= count
            yield buffer[:count]


class AclMemory:
    """Memory of Ascend's runtime: allocations of at most 1 GiB (or one tensor), with the tensors one after another."""

    def __init__(self, card: int, tensors: Sequence[CheckpointTensor]) -> None:
        self._checkpoint = {tensor.name: tensor for tensor in tensors}
        self._acl = acl.load()
        self._acl.set_device(card)
        self._buffer = ctypes.create_string_buffer(_BUFFER_BYTES)
        self.tensors: dict[str, DeviceTensor] = {}
        for group in _groups(tensors):
            size = sum(_aligned(tensor.size_bytes) for tensor in group)
            segment = Segment(0, 0)
            if size:
                size = -(-size // _PAGE_BYTES) * _PAGE_BYTES
                segment = Segment(self._acl.malloc(size), size)
            at = segment.base
            for tensor in group:
                self.tensors[tensor.name] = DeviceTensor(
                    at if tensor.size_bytes else 0,
                    TYPES[tensor.dtype],
                    tensor.shape,
                    _stride(tensor.shape),
                    tensor.size_bytes,
                    card,
                    segment=segment if tensor.size_bytes else None,
                )
                at += _aligned(tensor.size_bytes)

    def load(self) -> None:
        start = ctypes.addressof(self._buffer)
        view = memoryview(self._buffer).cast("B")
        for tensor in self._checkpoint.values():
            at = self.tensors[tensor.name].address
            with tensor.file.open("rb", buffering=0) as stream:
                stream.seek(tensor.begin)
                remaining = tensor.size_bytes
                while remaining:
                    count = stream.readinto(view[: min(remaining, len(view))])
                    if not count:
                        raise OSError(f"{tensor.file} ended before the tensor did; write the checkpoint again")
                    self._acl.memcpy(at, remaining, start, count, MemcpyKind.HOST_TO_DEVICE)
                    at, remaining = at + count, remaining - count

    def content(self, name: str) -> Iterator[memoryview]:
        """Each part is overwritten by the next."""
        tensor = self.tensors[name]
        start, view = ctypes.addressof(self._buffer), memoryview(self._buffer).cast("B")
        for offset in range(0, tensor.storage_bytes, len(view)):
            count = min(len(view), tensor.storage_bytes - offset)
            self._acl.memcpy(start, count, tensor.address + offset, count, MemcpyKind.DEVICE_TO_HOST)
            yield view[:count]


class TorchMemory:
    """Tensors of torch_npu."""

    def __init__(self, card: int, tensors: Sequence[CheckpointTensor]) -> None:
        import importlib

        import torch

        self._torch: Any = torch
        self._npu: Any = importlib.import_module("torch_npu").npu
        self._checkpoint = list(tensors)
        self._npu.set_device(card)
        self.tensors = {
            tensor.name: torch.empty(tensor.shape, dtype=getattr(torch, TYPES[tensor.dtype]), device=f"npu:{card}")
            for tensor in tensors
        }

    def load(self) -> None:
        from safetensors import safe_open

        for file in sorted({tensor.file for tensor in self._checkpoint}):
            with safe_open(os.fspath(file), framework="pt") as opened:
                for tensor in self._checkpoint:
                    if tensor.file == file:
                        self.tensors[tensor.name].copy_(opened.get_tensor(tensor.name))
        self._npu.synchronize()

    def content(self, name: str) -> Iterator[memoryview]:
        flat = self.tensors[name].cpu().contiguous().reshape(-1)
        if flat.numel():
            yield flat.view(self._torch.uint8).numpy().data


def _groups(tensors: Sequence[CheckpointTensor]) -> Iterator[list[CheckpointTensor]]:
    group: list[CheckpointTensor] = []
    size = 0
    for tensor in tensors:
        if group and size + _aligned(tensor.size_bytes) > _SEGMENT_BYTES:
            yield group
            group, size = [], 0
        group.append(tensor)
        size += _aligned(tensor.size_bytes)
    if group:
        yield group


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _stride(shape: Sequence[int]) -> tuple[int, ...]:
    stride: list[int] = []
    count = 1
    for size in reversed(shape):
        stride.insert(0, count)
        count *= size
    return tuple(stride)
