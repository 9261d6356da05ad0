"""A Qwen2-architecture checkpoint of a wanted size with seeded random weights, made once and kept in the user's cache.

Every tensor is random, biases and norms too, so that each one matters to the logits. Embedding and output weights are
tied, as in the small Qwen2 models. A directory appears under its final name only when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from weight_broker.integrations.checkpoint import CheckpointError, checkpoint_tensors
from weight_broker.integrations.checkpoint.cache import cache_directory

Report = Callable[[int, int], None]
"""Called with bytes written so far and bytes to write."""

SMALLEST_BYTES = 1 << 20
LARGEST_BYTES = 1 << 40
DEFAULT_SIZE = 1_000_000_000
_FORM = 1
_SEED = 20
_HEAD_SIZE = 64
_WANTED_LAYERS = 24
_ELEMENT_BYTES = 2
_CHUNK_ELEMENTS = 1 << 22
_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str) -> int:
    """Bytes in a text like "64M", "1.5G" or "2GiB" (powers of 1024) or "500MB" (powers of 1000)."""
    trimmed = text.strip().upper()
    number = trimmed.rstrip("BKMGTI")
    unit = trimmed[len(number) :]
    try:
        if len(unit) == 2 and unit[1] == "B":
            scale = 1000 ** " KMGT".index(unit[0])
        else:
            scale = _UNITS[unit.removesuffix("IB") if len(unit) == 3 else unit]
        size = int(float(number) * scale)
    except (KeyError, ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a size; write it like 64M or 1G") from None
    if not SMALLEST_BYTES <= size <= LARGEST_BYTES:
        raise ValueError(f"{text!r} is out of range; 1M to 1T are possible")
    return size


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Qwen2 model with tied embeddings."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.hidden // _HEAD_SIZE

    @property
    def key_value_heads(self) -> int:
        """Number of key and value heads."""
        return 2 if self.heads % 2 == 0 else 1

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor in the checkpoint."""
        hidden, narrow = self.hidden, self.key_value_heads * _HEAD_SIZE
        yield "model.embed_tokens.weight", (self.vocabulary, hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield f"{prefix}input_layernorm.weight", (hidden,)
            yield f"{prefix}mlp.down_proj.weight", (hidden, self.intermediate)
            yield f"{prefix}mlp.gate_proj.weight", (self.intermediate, hidden)
            yield f"{prefix}mlp.up_proj.weight", (self.intermediate, hidden)
            yield f"{prefix}post_attention_layernorm.weight", (hidden,)
            for name, rows in (("q", hidden), ("k", narrow), ("v", narrow)):
                yield f"{prefix}self_attn.{name}_proj.bias", (rows,)
                yield f"{prefix}self_attn.{name}_proj.weight", (rows, hidden)
            yield f"{prefix}self_attn.o_proj.weight", (hidden, hidden)
        yield "model.norm.weight", (hidden,)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(_elements(shape) for _, shape in self.tensors()) * _ELEMENT_BYTES

    def configuration(self) -> dict[str, object]:
        """The content of config.json."""
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "dtype": "bfloat16",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "max_position_embeddings": 4096,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": True,
        }


def model_shape(size_bytes: int) -> ModelShape:
    """The shape whose checkpoint is closest to `size_bytes`, at about 24 layers like Qwen2-0.5B."""
    vocabulary = 151_936 if size_bytes >= 500_000_000 else 32_000 if size_bytes >= 32 << 20 else 1024

    def candidates() -> Iterator[ModelShape]:
        for hidden in range(_HEAD_SIZE, 1 << 15, _HEAD_SIZE):
            intermediate = -(-hidden * 38 // 7 // 128) * 128
            smallest = ModelShape(hidden, intermediate, 1, vocabulary)
            per_layer = ModelShape(hidden, intermediate, 2, vocabulary).size_bytes - smallest.size_bytes
            fitting = 1 + round((size_bytes - smallest.size_bytes) / per_layer)
            if fitting < 1:
                return
            yield ModelShape(hidden, intermediate, fitting, vocabulary)

    found = list(candidates())
    if not found:
        return ModelShape(_HEAD_SIZE, 384, 1, vocabulary)
    return min(found, key=lambda shape: abs(shape.layers - _WANTED_LAYERS))


def ensure_checkpoint(size_bytes: int, report: Report, *, directory: Path | None = None) -> Path:
    """The directory of a complete checkpoint of about `size_bytes`; writes it first if it is not in the cache.

    `directory` replaces the user's cache. Raises `OSError` if it cannot be written.
    """
    shape = model_shape(size_bytes)
    base = (directory if directory is not None else cache_directory() / "demo").absolute()
    name = f"qwen2-{shape.hidden}x{shape.layers}-{shape.vocabulary}-seed{_SEED}-v{_FORM}"
    final = base / name
    if _is_complete(final, shape):
        return final
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    _remove_leftovers(base)
    free = shutil.disk_usage(base).free
    if free < shape.size_bytes * 1.05:
        raise OSError(f"{base} has {free >> 20} MiB free; the checkpoint needs {shape.size_bytes >> 20} MiB")
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}.{os.getpid()}.", dir=base))
    try:
        _write(temporary, shape, report)
        if final.exists() and not _is_complete(final, shape):
            shutil.rmtree(final)
        with suppress(FileExistsError, OSError):  # another process was faster; its bytes are the same
            os.rename(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if not _is_complete(final, shape):
        raise OSError(f"{final} could not be completed")
    return final


def _is_complete(directory: Path, shape: ModelShape) -> bool:
    try:
        written = {tensor.name: tensor.shape for tensor in checkpoint_tensors(directory / "model.safetensors")}
        configuration = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError, CheckpointError):
        return False
    return written == dict(shape.tensors()) and configuration == shape.configuration()


def _remove_leftovers(base: Path) -> None:
    """Removes what a killed process left behind."""
    for path in base.glob(".qwen2-*.*"):
        owner = path.name.split(".")[-2]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(path, ignore_errors=True)


def _write(directory: Path, shape: ModelShape, report: Report) -> None:
    (directory / "config.json").write_text(json.dumps(shape.configuration(), indent=2) + "\n")
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor_shape in shape.tensors():
        end = offset + _elements(tensor_shape) * _ELEMENT_BYTES
        header[name] = {"dtype": "BF16", "shape": list(tensor_shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with (directory / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        _write_tensors(stream, shape, report)
        stream.flush()
        # Also what lets the page cache be dropped afterwards: pages that are not on disk yet stay.
        os.fsync(stream.fileno())


def _write_tensors(stream: IO[bytes], shape: ModelShape, report: Report) -> None:
    import torch

    generator = torch.Generator().manual_seed(_SEED)
    total, written = shape.size_bytes, 0
    scratch = torch.empty(_CHUNK_ELEMENTS, dtype=torch.float32)
    for name, tensor_shape in shape.tensors():
        remaining = _elements(tensor_shape)
        while remaining:
            count = min(remaining, _CHUNK_ELEMENTS)
            values = scratch[:count].uniform_(-0.05, 0.05, generator=generator)
            if name.endswith("norm.weight"):
                values += 1.0
            stream.write(values.to(torch.bfloat16).view(torch.uint8).numpy().data)
            remaining -= count
            written += count * _ELEMENT_BYTES
            report(written, total)


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
