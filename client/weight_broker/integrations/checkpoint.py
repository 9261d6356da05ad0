"""A digest of a checkpoint directory that tells two checkpoints of the same shape apart.

It covers the configuration, the name, type and shape of every tensor, and content: by default a sample of each tensor
(all of one up to 8 KiB, else its first and last 4 KiB), with `full=True` every byte. Fine-tuning changes practically
every value of the tensors that it trains, so the sample tells it apart from its base; only `full=True` catches an edit
of a few values in the middle of a large tensor. How the tensors are spread over files does not matter.

Cost measured on a 2-core virtual machine with 1 GB in 290 tensors: 21 ms with a cold page cache, 7 ms with a warm one;
with `full=True` 0.7 s and 0.35 s; 0.2 ms when the files have not changed since the last time
(`weight_broker.integrations.checkpoint_cache`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from weight_broker.integrations.checkpoint_cache import CheckpointCache

SAMPLE_BYTES = 4096
_FULL_BLOCK_BYTES = 1 << 20
_MAX_HEADER_BYTES = 100_000_000
_READERS = 8
_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_HUB_SNAPSHOT = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)/snapshots/(?P<revision>[^/]+)$")
# Written at the last save; independent of the weights.
_VOLATILE_SETTINGS = ("transformers_version", "_name_or_path")


class CheckpointError(ValueError):
    """The directory is not a readable safetensors checkpoint; the message names the file and what is wrong."""


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """One tensor of a checkpoint."""

    name: str
    dtype: str
    """Element type by its safetensors name, for example "BF16"."""
    shape: tuple[int, ...]
    file: Path
    begin: int
    """Offset of its first byte in the file."""
    size_bytes: int


def checkpoint_digest(
    model_dir: str | os.PathLike[str],
    *,
    full: bool = False,
    cache: bool = True,
    files: Sequence[Path] | None = None,
) -> str:
    """The digest of the safetensors checkpoint in `model_dir`: "sampled-sha256:" or "full-sha256:" and 32 hex digits.

    `files` are the weight files that the caller is going to read, in that order, if it chooses otherwise than
    `checkpoint_files`; the same tensor may then be in several of them. `cache=False` neither reads nor writes the
    per-user cache. Raises `CheckpointError` if there is no safetensors checkpoint or it is damaged, `OSError` if it
    cannot be read.
    """
    directory = Path(model_dir)
    chosen = files is not None
    files = tuple(files) if files is not None else checkpoint_files(directory)
    if not cache:
        return _compute(directory, files, full, repeated=chosen)
    store = CheckpointCache.of_user()
    described = [directory / name for name in ("config.json", _INDEX_FILE) if (directory / name).exists()]
    kind = ("full" if full else "sampled") + (" chosen" if chosen else "")
    signature = store.signature([*described, *files], kind)
    found = store.get(signature)
    if found is None:
        found = _compute(directory, files, full, repeated=chosen)
        store.put(signature, found)
    return found


def checkpoint_name(model_dir: str | os.PathLike[str]) -> tuple[str, str]:
    """Name and revision of the model in `model_dir`: the repository's and the commit for a snapshot in the hub's cache,
    else the directory's name and none."""
    path = Path(model_dir).absolute()
    snapshot = _HUB_SNAPSHOT.search(str(path))
    if snapshot:
        return f"{snapshot['owner']}/{snapshot['name']}", snapshot["revision"]
    return path.resolve().name or str(path), ""


def checkpoint_files(model_dir: Path, *, index_first: bool = False) -> tuple[Path, ...]:
    """The weight files of a checkpoint: `model.safetensors`, else what the index names, else every `*.safetensors`;
    with `index_first` the index goes before a single file."""
    if not model_dir.is_dir():
        raise CheckpointError(f"{model_dir} is not a directory")
    single, index = model_dir / _SINGLE_FILE, model_dir / _INDEX_FILE
    if single.is_file() and not (index_first and index.is_file()):
        return (single,)
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(f"{index} names {name!r}, which is not a file of the same directory")
            if not (model_dir / name).is_file():
                raise CheckpointError(f"{index} names {name}, which is missing; is the download complete?")
        return tuple(model_dir / name for name in names)
    files = tuple(sorted(path for path in model_dir.glob("*.safetensors") if path.is_file()))
    if not files:
        raise CheckpointError(f"{model_dir} has no *.safetensors file; only safetensors checkpoints have a digest")
    return files


def checkpoint_tensors(file: Path) -> tuple[CheckpointTensor, ...]:
    """The tensors of one safetensors file, in the order of its bytes. Raises `CheckpointError`."""
    with file.open("rb") as stream:
        file_bytes = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, file_bytes - 8):
            raise CheckpointError(f"{file} is not a safetensors file, or it is cut off ({file_bytes} bytes)")
        text = stream.read(header_bytes)
    try:
        header = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{file} has a header that is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} has a header that is not a JSON object")
    start, tensors = 8 + header_bytes, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            begin, end = (int(offset) for offset in entry["data_offsets"])
            tensor = CheckpointTensor(
                name, str(entry["dtype"]), tuple(map(int, entry["shape"])), file, start + begin, end - begin
            )
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{file} has a damaged header entry for {name!r}") from None
        if begin < 0 or end < begin or start + end > file_bytes:
            raise CheckpointError(f"{file} ends before tensor {name!r} does; is the download complete?")
        tensors.append(tensor)
    return tuple(sorted(tensors, key=lambda tensor: (tensor.begin, tensor.name)))


def _compute(directory: Path, files: Sequence[Path], full: bool, *, repeated: bool = False) -> str:
    tensors = [tensor for file in files for tensor in checkpoint_tensors(file)]
    if not tensors:
        raise CheckpointError(f"{directory} has no tensors in its safetensors files")
    with ExitStack() as stack:
        descriptors: dict[Path, int] = {}
        for file in files:
            descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, descriptors[file])
            # Read-ahead would read many times the sample.
            os.posix_fadvise(descriptors[file], 0, 0, os.POSIX_FADV_SEQUENTIAL if full else os.POSIX_FADV_RANDOM)
        # In the order of the files, for the disk's sake; side by side, because each read waits for the disk.
        pool = stack.enter_context(ThreadPoolExecutor(_READERS, thread_name_prefix="checkpoint-digest"))
        contents = list(pool.map(lambda tensor: _content(descriptors[tensor.file], tensor, full), tensors))
    rows = sorted(
        (tensor.name, tensor.dtype, tensor.shape, content) for tensor, content in zip(tensors, contents, strict=True)
    )
    for row, next_row in itertools.pairwise(rows):
        if row[0] == next_row[0] and not repeated:
            raise CheckpointError(f"{directory} has tensor {row[0]!r} in more than one file")
    if len({row[0] for row in rows}) < len(rows):  # the file that is read last decides
        rows.append(("", "", (), " ".join(file.name for file in files)))
    coverage = "full" if full else "sampled"
    form = json.dumps(["checkpoint/1", coverage, _configuration(directory), rows], separators=(",", ":"))
    return f"{coverage}-sha256:{hashlib.sha256(form.encode()).hexdigest()[:32]}"


def _content(descriptor: int, tensor: CheckpointTensor, full: bool) -> str:
    digest = hashlib.sha256()
    for offset, length in _blocks(tensor.size_bytes, full):
        block = os.pread(descriptor, length, tensor.begin + offset)
        if len(block) != length:
            raise CheckpointError(f"{tensor.file} was cut off while it was read")
        digest.update(block)
    return digest.hexdigest()


def _blocks(size_bytes: int, full: bool) -> Iterator[tuple[int, int]]:
    if full:
        for offset in range(0, size_bytes, _FULL_BLOCK_BYTES):
            yield offset, min(_FULL_BLOCK_BYTES, size_bytes - offset)
    elif size_bytes <= 2 * SAMPLE_BYTES:
        yield 0, size_bytes
    else:
        yield 0, SAMPLE_BYTES
        yield size_bytes - SAMPLE_BYTES, SAMPLE_BYTES


def _configuration(directory: Path) -> dict[str, object]:
    path = directory / "config.json"
    if not path.exists():
        return {}
    settings = {name: value for name, value in _read_json(path).items() if name not in _VOLATILE_SETTINGS}
    return dict(sorted(settings.items()))


def _read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content
