"""A digest of a checkpoint directory that tells two checkpoints of the same shape apart.

It covers the configuration, the name, type and shape of every tensor, and content of the files that the loader reads:

- For files in the hub's cache the SHA-256 that they were downloaded with, and both ends of each tensor.
- For files that torch.save wrote, the CRC-32 of every record, and a sample.
- For other safetensors files a sample (`weight_broker.integrations.checkpoint.sample`): every byte of tables of tokens,
  norms and biases, blocks of the matrices. With `full=True` every byte of all files, which is read once and then
  remembered for as long as the files do not change (`weight_broker.integrations.checkpoint.cache`).

docs/design/identity.md has the reasons, what may escape a sample, and measurements.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from weight_broker.integrations.checkpoint.cache import CheckpointCache
from weight_broker.integrations.checkpoint.files import CONFIGURATION, checkpoint_files, description_files
from weight_broker.integrations.checkpoint.header import CheckpointError, CheckpointTensor, contents, read_json
from weight_broker.integrations.checkpoint.hub import known_sha256
from weight_broker.integrations.checkpoint.sample import BLOCK_BYTES, sampled_ranges, table_lengths

_FORM = "checkpoint/2"
_TASK_BYTES = 8 << 20
"""Digested in one go by one thread. Part of the form."""
_READ_BYTES = 1 << 20
_READERS = 8
# Written at the last save; independent of the weights.
_VOLATILE_SETTINGS = ("transformers_version", "_name_or_path")
_FULL, _SAMPLED, _HUB = "full", "sampled", "hub"


def checkpoint_digest(
    model_dir: str | os.PathLike[str],
    *,
    full: bool = False,
    cache: bool = True,
    files: Sequence[Path] | None = None,
) -> str:
    """The digest of the checkpoint in `model_dir`: "sampled-sha256:", "hub-sha256:" (all files are in the hub's cache)
    or "full-sha256:", and 32 hex digits.

    `files` are the weight files that the caller is going to read, in that order, if it chooses otherwise than
    `checkpoint_files`; the same tensor may then be in several of them. `cache=False` neither reads nor writes the
    per-user cache. Raises `CheckpointError` if there is no checkpoint with a digest or it is damaged, `OSError` if it
    cannot be read.
    """
    directory = Path(model_dir)
    chosen = files is not None
    files = tuple(files) if files is not None else checkpoint_files(directory)
    known = [known_sha256(file) for file in files]
    coverage = _FULL if full else _HUB if all(known) else _SAMPLED
    if not cache:
        return _compute(directory, files, coverage, known, repeated=chosen)
    store = CheckpointCache.of_user()
    kind = " ".join((_FORM, coverage, "chosen" if chosen else "", *known))
    signature = store.signature([*description_files(directory), *files], kind)
    found = store.get(signature)
    if found is None:
        found = _compute(directory, files, coverage, known, repeated=chosen)
        store.put(signature, found)
    return found


def _compute(
    directory: Path, files: Sequence[Path], coverage: str, known: Sequence[str], *, repeated: bool = False
) -> str:
    tensors = [tensor for file in files for tensor in contents(file)]
    if not tensors:
        raise CheckpointError(f"{directory} has no tensors in its weight files")
    configuration = _configuration(directory)
    digests = _digests(files, tensors, coverage, table_lengths(configuration))
    rows = sorted(
        (tensor.name, tensor.dtype, tensor.shape, content) for tensor, content in zip(tensors, digests, strict=True)
    )
    for row, next_row in itertools.pairwise(rows):
        if row[0] == next_row[0] and not repeated:
            raise CheckpointError(f"{directory} has tensor {row[0]!r} in more than one file")
    if len({row[0] for row in rows}) < len(rows):  # the file that is read last decides
        rows.append(("", "", (), " ".join(file.name for file in files)))
    parts = [_FORM, coverage, configuration, rows, list(known) if coverage == _HUB else []]
    form = json.dumps(parts, separators=(",", ":"))
    return f"{coverage}-sha256:{hashlib.sha256(form.encode()).hexdigest()[:32]}"


def _digests(
    files: Sequence[Path], tensors: Sequence[CheckpointTensor], coverage: str, tables: Collection[int]
) -> list[str]:
    """The content digest of each tensor, as far as `coverage` demands."""
    with ExitStack() as stack:
        descriptors: dict[Path, int] = {}
        for file in files:
            descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, descriptors[file])
            # Read-ahead would read many times the sample.
            advice = os.POSIX_FADV_SEQUENTIAL if coverage == _FULL else os.POSIX_FADV_RANDOM
            os.posix_fadvise(descriptors[file], 0, 0, advice)
        tasks = [
            (index, batch)
            for index, tensor in enumerate(tensors)
            for batch in _batches(_covered(tensor, coverage, tables))
        ]
        # In the order of the files, for the disk's sake; side by side, because each read waits for the disk.
        pool = stack.enter_context(ThreadPoolExecutor(_READERS, thread_name_prefix="checkpoint-digest"))
        found = pool.map(lambda task: _read(descriptors[tensors[task[0]].file], tensors[task[0]], task[1]), tasks)
        parts: list[bytes] = [b""] * len(tensors)
        for (index, _), digest in zip(tasks, found, strict=True):
            parts[index] += digest
    return [hashlib.sha256(part).hexdigest() for part in parts]


def _covered(tensor: CheckpointTensor, coverage: str, tables: Collection[int]) -> list[tuple[int, int]]:
    if coverage == _SAMPLED:
        return sampled_ranges(tensor.name, tensor.shape, tensor.size_bytes, tables)
    if coverage == _FULL or tensor.size_bytes <= 2 * BLOCK_BYTES:
        return [(0, tensor.size_bytes)]
    # The SHA-256 says what the files were; the ends say whether a file was written to since.
    return [(0, BLOCK_BYTES), (tensor.size_bytes - BLOCK_BYTES, BLOCK_BYTES)]


def _batches(ranges: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    batch: list[tuple[int, int]] = []
    left = _TASK_BYTES
    for begin, length in ranges:
        for offset in range(begin, begin + length, _READ_BYTES):
            size = min(_READ_BYTES, begin + length - offset)
            if size > left:
                yield batch
                batch, left = [], _TASK_BYTES
            batch.append((offset, size))
            left -= size
    if batch:
        yield batch


def _read(descriptor: int, tensor: CheckpointTensor, ranges: Sequence[tuple[int, int]]) -> bytes:
    digest = hashlib.sha256()
    for offset, length in ranges:
        block = os.pread(descriptor, length, tensor.begin + offset)
        if len(block) != length:
            raise CheckpointError(f"{tensor.file} was cut off while it was read")
        digest.update(block)
    return digest.digest()


def _configuration(directory: Path) -> dict[str, object]:
    path = directory / CONFIGURATION
    if not path.exists():
        return {}
    settings = {name: value for name, value in read_json(path).items() if name not in _VOLATILE_SETTINGS}
    return dict(sorted(settings.items()))
