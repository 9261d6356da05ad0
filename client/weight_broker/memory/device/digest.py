"""Digests of device memory, computed on the device.

The blocks are copied into a scratch buffer of the framework's, row by row, and summed up there: this
works for every memory format without another view of the framework's memory.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from weight_broker import multilinear
from weight_broker.digest import (
    FULL_BLOCK_BYTES,
    GLANCE_BLOCK_BYTES,
    ContentDigests,
    DigestAlgorithm,
    DigestCoverage,
    combine,
    sampled_blocks,
)
from weight_broker.memory.described import DescribedTensors
from weight_broker.memory.kind import DeadlinePassed

if TYPE_CHECKING:
    import torch

SCRATCH_BYTES = 16 << 20
ROW_BYTES = (4 << 10, 64 << 10, FULL_BLOCK_BYTES)
"""Blocks go into the narrowest row that holds them: the rest of a row is computed in vain."""

Block = tuple[int, int]
"""Device address, length in bytes."""


class BlockDigester(Protocol):
    """Digests blocks of device memory."""

    def block_digests(self, blocks: Sequence[Block], deadline: float | None) -> list[int]:
        """MULTILINEAR_64 of each block of at most `FULL_BLOCK_BYTES`. Raises `DeadlinePassed`."""
        ...


def tensor_digests(
    described: DescribedTensors, digester: BlockDigester, deadline: float | None, *, sampled: bool = False
) -> ContentDigests:
    """Full digests of all tensors, or of a few short blocks of each. Raises `DeadlinePassed` and what the driver
    raises."""
    blocks: list[Block] = []
    counts: list[int] = []
    for tensor in described.tensors:
        parts = list(_parts(tensor.spec.content_bytes, sampled))
        counts.append(len(parts))
        blocks += [(tensor.address + offset, length) for offset, length in parts]
    found = iter(digester.block_digests(blocks, deadline))
    by_tensor = (list(islice(found, count)) for count in counts)
    values = tuple(combine(DigestAlgorithm.MULTILINEAR_64, digests) if digests else 0 for digests in by_tensor)
    if sampled:
        return ContentDigests(DigestAlgorithm.MULTILINEAR_64, DigestCoverage.SAMPLED, GLANCE_BLOCK_BYTES, values)
    return ContentDigests(DigestAlgorithm.MULTILINEAR_64, DigestCoverage.FULL, FULL_BLOCK_BYTES, values)


def _parts(size: int, sampled: bool) -> Iterator[Block]:
    """(offset, length) of the blocks of a content."""
    if sampled:
        yield from sampled_blocks(size, GLANCE_BLOCK_BYTES)
        return
    for offset in range(0, size, FULL_BLOCK_BYTES):
        yield offset, min(FULL_BLOCK_BYTES, size - offset)


class HostDigester:
    """Brings the bytes to the processor: for memory that no framework on this machine computes with.

    `read` copies (host address, device address, size) and waits.
    """

    def __init__(self, read: Callable[[int, int, int], object]) -> None:
        self._read = read

    def block_digests(self, blocks: Sequence[Block], deadline: float | None) -> list[int]:
        """Reads one block at a time."""
        host = ctypes.create_string_buffer(FULL_BLOCK_BYTES)
        digests: list[int] = []
        for address, length in blocks:
            _check(deadline)
            self._read(ctypes.addressof(host), address, length)
            digests.append(multilinear.digest(memoryview(host)[:length]))
        return digests


class TorchDigester:
    """Computes with torch operations on `device`, in `SCRATCH_BYTES` and twice that for intermediate results.

    `copy` copies (destination, source, size) within the device before any later work of torch;
    `synchronize` waits for torch.
    """

    def __init__(
        self, device: torch.device | str, copy: Callable[[int, int, int], object], synchronize: Callable[[], object]
    ) -> None:
        self._device = device
        self._copy = copy
        self._synchronize = synchronize

    def block_digests(self, blocks: Sequence[Block], deadline: float | None) -> list[int]:
        """MULTILINEAR_64 of each block. Raises `DeadlinePassed`."""
        import torch

        digests = [0] * len(blocks)
        scratch = torch.empty(SCRATCH_BYTES // multilinear.WORD_BYTES, dtype=torch.int32, device=self._device)
        factors = _multipliers(FULL_BLOCK_BYTES // multilinear.WORD_BYTES).to(self._device)
        order: list[int] = []
        sums: list[Any] = []
        with torch.no_grad():
            for indices, row_bytes in _batches(blocks):
                _check(deadline)
                row_words = row_bytes // multilinear.WORD_BYTES
                rows = scratch[: len(indices) * row_words].view(len(indices), row_words)
                self._fill(rows, row_bytes, [blocks[index] for index in indices])
                words = rows.to(torch.int64).bitwise_and_(0xFFFFFFFF)
                sums.append(words.mul_(factors[:row_words]).sum(dim=1))
                order += indices
            results = torch.cat(sums).tolist() if sums else []
        for index, result in zip(order, results, strict=True):
            digests[index] = (result + blocks[index][1] * multilinear.multiplier(0)) & multilinear.MASK
        return digests

    def _fill(self, rows: torch.Tensor, row_bytes: int, blocks: Sequence[Block]) -> None:
        if any(length < row_bytes for _, length in blocks):
            rows.zero_()
        self._synchronize()  # the sums of the batch before have been read, the zeros have been written
        begin = rows.data_ptr()
        for row, (address, length) in enumerate(blocks):
            self._copy(begin + row * row_bytes, address, length)


def _batches(blocks: Sequence[Block]) -> Iterator[tuple[list[int], int]]:
    """Indices of the blocks that are digested together, and the bytes of a row."""
    narrower = 0
    for row_bytes in ROW_BYTES:
        fitting = (index for index, (_, length) in enumerate(blocks) if narrower < length <= row_bytes)
        yield from iter(partial(_take, fitting, SCRATCH_BYTES // row_bytes, row_bytes), ([], row_bytes))
        narrower = row_bytes


def _take(indices: Iterator[int], count: int, row_bytes: int) -> tuple[list[int], int]:
    return list(islice(indices, count)), row_bytes


def _multipliers(count: int) -> torch.Tensor:
    """m1 to m`count` as signed numbers; what wraps around is the same."""
    import torch

    def signed(value: int) -> int:
        return value - (1 << 64) if value >> 63 else value

    def shifted_right(values: torch.Tensor, bits: int) -> torch.Tensor:
        return (values >> bits) & ((1 << (64 - bits)) - 1)  # torch's own shift keeps the sign

    mixed = torch.arange(2, count + 2, dtype=torch.int64, device="cpu") * signed(multilinear.GAMMA) + signed(
        multilinear.SEED
    )
    for bits, factor in multilinear.MIX:
        mixed = (mixed ^ shifted_right(mixed, bits)) * signed(factor)
    return (mixed ^ shifted_right(mixed, multilinear.LAST_SHIFT)) | 1


def _check(deadline: float | None) -> None:
    if deadline is not None and time.monotonic() >= deadline:
        raise DeadlinePassed
