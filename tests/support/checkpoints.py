"""Checkpoint directories, written byte by byte."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

TENSORS = {"large": bytes(range(256)) * 256, "small": b"abcd" * 8, "empty": b""}


def write_file(
    path: Path, tensors: Mapping[str, bytes], *, shapes: Mapping[str, list[int]] | None = None, padding: int = 0
) -> None:
    """A safetensors file with tensors of bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, content in tensors.items():
        shape = (shapes or {}).get(name, [len(content)])
        header[name] = {"dtype": "U8", "shape": shape, "data_offsets": [offset, offset + len(content)]}
        offset += len(content)
    text = json.dumps(header).encode() + b" " * padding
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(tensors.values()))


def write_checkpoint(
    directory: Path,
    tensors: Mapping[str, bytes] = TENSORS,
    *,
    shapes: Mapping[str, list[int]] | None = None,
    **settings: object,
) -> Path:
    """A checkpoint in one file."""
    directory.mkdir(exist_ok=True, parents=True)
    write_file(directory / "model.safetensors", tensors, shapes=shapes)
    (directory / "config.json").write_text(json.dumps({"hidden_size": 8, **settings}))
    return directory


def write_shards(directory: Path, shards: Mapping[str, Mapping[str, bytes]]) -> Path:
    """A checkpoint in several files with an index."""
    directory.mkdir()
    for name, tensors in shards.items():
        write_file(directory / name, tensors)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps({"hidden_size": 8}))
    return directory


def with_byte(content: bytes, position: int) -> bytes:
    """The content with another byte at a position."""
    changed = bytearray(content)
    changed[position] ^= 1
    return bytes(changed)
