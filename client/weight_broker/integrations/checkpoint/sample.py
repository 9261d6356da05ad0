"""Which bytes of a tensor its sampled digest covers.

- Every byte of a tensor up to `WHOLE_BYTES` (norms, biases, scales, the small matrices), and of every table with a row
  for each token: training a few tokens changes a few rows, which no spaced sample would see.
- Of every other tensor the first and the last block, a block in each `STRIDE_BYTES`, and a block in each of the
  matrices that it is a stack of (experts).

So a change is seen for certain if it touches a small tensor, a token's row, an end, a whole matrix of a stack or
`STRIDE_BYTES` in a row. A change of scattered blocks, a share f of all of them, is missed with probability (1-f)^n at n
blocks: training a matrix, or merging an adapter into it, changes practically all blocks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

WHOLE_BYTES = 1 << 20
STRIDE_BYTES = 4 << 20
BLOCK_BYTES = 4096
_TABLES = ("embed", "wte", "wpe", "lm_head", "shared.weight", "token")
"""Parts of the names of tables, for those whose length the configuration does not say."""


def sampled_ranges(
    name: str, shape: tuple[int, ...], size_bytes: int, tables: Collection[int]
) -> list[tuple[int, int]]:
    """(offset, length) of what the sample covers, in order. `tables` are the lengths of the tables of tokens."""
    if size_bytes <= WHOLE_BYTES or _is_table(name, shape, tables):
        return [(0, size_bytes)]
    offsets = set(_evenly_spaced(size_bytes)) | set(_in_each_matrix(shape, size_bytes))
    if len(offsets) * BLOCK_BYTES >= size_bytes:
        return [(0, size_bytes)]
    return [(offset, min(BLOCK_BYTES, size_bytes - offset)) for offset in sorted(offsets)]


def table_lengths(configuration: object) -> set[int]:
    """Every `vocab_size` in a configuration, at any depth."""
    found: set[int] = set()
    waiting = [configuration]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            found |= {size for key, size in value.items() if "vocab_size" in str(key) and isinstance(size, int)}
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return found


def _is_table(name: str, shape: tuple[int, ...], tables: Collection[int]) -> bool:
    return len(shape) > 1 and (shape[0] in tables or any(part in name for part in _TABLES))


def _evenly_spaced(size_bytes: int) -> Iterator[int]:
    last = size_bytes - BLOCK_BYTES
    count = -(-size_bytes // STRIDE_BYTES) + 1
    return (index * last // (count - 1) for index in range(count))


def _in_each_matrix(shape: tuple[int, ...], size_bytes: int) -> Iterator[int]:
    matrices = math.prod(shape[:-2])
    if len(shape) < 3 or not matrices:
        return iter(())
    matrix_bytes = size_bytes // matrices
    if matrix_bytes < BLOCK_BYTES:
        return iter(range(0, size_bytes, BLOCK_BYTES))
    return (index * matrix_bytes + (matrix_bytes - BLOCK_BYTES) // 2 for index in range(matrices))
