"""Checkpoints on disk, in or out of the page cache, and loading one the plain way."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from benchmarks.weights import Tensors
from safetensors.torch import load_file

from weight_broker.demo.checkpoint import ensure_checkpoint
from weight_broker.demo.page_cache import evict, resident_share

COLD_SHARE = 0.001
"""Up to this share of its pages in the page cache a file counts as cold."""


@contextlib.contextmanager
def checkpoint(parent: Path, size_bytes: int) -> Iterator[Path]:
    """The safetensors file of a Qwen2 checkpoint with random weights, for the length of a block."""
    directory = Path(tempfile.mkdtemp(prefix="weight-broker-benchmark-", dir=parent))
    try:
        yield ensure_checkpoint(size_bytes, lambda _done, _total: None, directory=directory) / "model.safetensors"
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def make_cold(file: Path) -> float:
    """Drops the file from the page cache; returns the share of its pages that are in there all the same."""
    evict([file])
    share = resident_share([file])
    return 1.0 if share is None else share


def make_warm(file: Path) -> None:
    """Reads the file once."""
    with file.open("rb", buffering=0) as stream:
        buffer = bytearray(8 << 20)
        while stream.readinto(buffer):
            pass


def load(file: Path, tensors: Tensors) -> None:
    """What a loader does without a broker: safetensors, copied into the module's tensors."""
    with torch.no_grad():
        for name, tensor in load_file(file).items():
            tensors[name].copy_(tensor)


def page_cache_state(share: float) -> str:
    """How cold a measurement was, from the largest share of pages that were left."""
    if share <= COLD_SHARE:
        return "page cache cold (mincore: no page resident)"
    return f"page cache NOT cold ({share:.0%} of the pages resident)"
