"""Tensors that cannot be read or written are refused by name, before the first byte: touching them is a signal."""

from __future__ import annotations

import ctypes
import mmap
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from weight_broker.errors import InvalidArgument
from weight_broker.memory.host.export import export
from weight_broker.memory.host.touchable import require_readable, require_writable
from weight_broker.memory.tensors import describe

COUNT = 1 << 14


@pytest.fixture(autouse=True)
def warnings_of_read_only_memory() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_only_file(directory: Path) -> torch.Tensor:
    np.save(directory / "w.npy", np.zeros(COUNT, np.float32))
    return torch.from_numpy(np.load(directory / "w.npy", mmap_mode="r"))


def read_only_anonymous(directory: Path) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(-1, COUNT, prot=mmap.PROT_READ), dtype=torch.uint8)


def protected_in_part(directory: Path) -> torch.Tensor:
    """Its last page only."""
    memory = mmap.mmap(-1, 4 * mmap.PAGESIZE)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    library = ctypes.CDLL(None, use_errno=True)
    last = ctypes.c_void_p(tensor.data_ptr() + 3 * mmap.PAGESIZE)
    assert library.mprotect(last, mmap.PAGESIZE, mmap.PROT_READ) == 0
    return tensor


def small_bytes(directory: Path) -> torch.Tensor:
    return torch.frombuffer(bytes(range(200)), dtype=torch.uint8)


def large_bytes(directory: Path) -> torch.Tensor:
    return torch.frombuffer(bytes(COUNT * 4), dtype=torch.float32)


def bytes_behind_a_header(directory: Path) -> torch.Tensor:
    return torch.frombuffer(bytes(COUNT * 4), dtype=torch.float32, offset=128)


def bytes_behind_a_long_header(directory: Path) -> torch.Tensor:
    """As a file of safetensors that was read as a whole."""
    return torch.frombuffer(bytes(COUNT * 40), dtype=torch.uint8, offset=50_008)


def rows_of_bytes(directory: Path) -> torch.Tensor:
    return torch.frombuffer(bytes(COUNT * 4), dtype=torch.float32).view(-1, 2)[100:]


def array_of_bytes(directory: Path) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(bytes(COUNT * 4), np.float32))


@pytest.mark.parametrize(
    "tensor",
    [
        read_only_file,
        read_only_anonymous,
        protected_in_part,
        small_bytes,
        large_bytes,
        bytes_behind_a_header,
        bytes_behind_a_long_header,
        rows_of_bytes,
        array_of_bytes,
    ],
)
def test_memory_that_must_not_be_written_is_refused(tensor: Callable[[Path], torch.Tensor], tmp_path: Path) -> None:
    tensors = {"fine": torch.zeros(4), "stubborn": tensor(tmp_path)}
    with pytest.raises(InvalidArgument, match=r"tensors\[stubborn\]\.memory"):
        require_writable(describe(tensors))


def test_memory_that_cannot_be_read_is_not_published() -> None:
    memory = mmap.mmap(-1, 4 * mmap.PAGESIZE)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    library = ctypes.CDLL(None, use_errno=True)
    last = ctypes.c_void_p(tensor.data_ptr() + 3 * mmap.PAGESIZE)
    assert library.mprotect(last, mmap.PAGESIZE, 0) == 0
    with pytest.raises(InvalidArgument, match=r"tensors\[w\]\.memory"):
        export(describe({"w": tensor}))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "content"
    path.write_bytes(bytes(4 * mmap.PAGESIZE))
    return path


@pytest.mark.parametrize("shared", [True, False])
def test_a_file_that_ends_before_its_mapping_is_refused(file: Path, shared: bool) -> None:
    tensor = torch.from_numpy(np.memmap(file, np.uint8, "r+" if shared else "c"))
    os.truncate(file, mmap.PAGESIZE)
    for use in (require_writable, require_readable, export):
        with pytest.raises(InvalidArgument, match="beyond the end of its file"):
            use(describe({"w": tensor}))


@pytest.mark.parametrize("tensor", [read_only_file, read_only_anonymous, large_bytes, array_of_bytes])
def test_memory_that_can_only_be_read_is_published(tensor: Callable[[Path], torch.Tensor], tmp_path: Path) -> None:
    export(describe({"w": tensor(tmp_path)})).close()


def owned(file: Path) -> torch.Tensor:
    return torch.zeros(COUNT)


def slice_of_a_slice(file: Path) -> torch.Tensor:
    return torch.zeros(COUNT)[100:200][7:]


def shared_file(file: Path) -> torch.Tensor:
    return torch.from_numpy(np.memmap(file, np.uint8, "r+"))


def private_file(file: Path) -> torch.Tensor:
    return torch.from_numpy(np.memmap(file, np.uint8, "c"))


def shared_memory(file: Path) -> torch.Tensor:
    tensor: torch.Tensor = torch.zeros(COUNT).share_memory_()  # type: ignore[no-untyped-call]
    return tensor


def changeable_bytes(file: Path) -> torch.Tensor:
    return torch.frombuffer(bytearray(COUNT * 4), dtype=torch.float32)


def beside_bytes(file: Path) -> torch.Tensor:
    """Right behind an object of bytes, as a heap may have it."""
    heap = bytearray(bytes(id(bytes).to_bytes(8, "little")) * 64 + bytes(COUNT))
    return torch.frombuffer(heap, dtype=torch.uint8, offset=512)


def without_elements(file: Path) -> torch.Tensor:
    return torch.zeros(0)


@pytest.mark.parametrize(
    "tensor",
    [
        owned,
        slice_of_a_slice,
        shared_file,
        private_file,
        shared_memory,
        changeable_bytes,
        beside_bytes,
        without_elements,
    ],
)
def test_memory_that_can_be_written_is_accepted_and_not_changed(
    tensor: Callable[[Path], torch.Tensor], file: Path
) -> None:
    created = tensor(file)
    before = created.clone()
    require_writable(describe({"w": created}))
    assert torch.equal(created, before)
