"""Where an engine's checkpoint is on this machine, and which of its files hold the weights."""

from __future__ import annotations

import os
from pathlib import Path

from weight_broker.integrations.checkpoint import CheckpointError, checkpoint_files
from weight_broker.integrations.engine.engine import NotServable

_PATTERNS = {"mistral": "consolidated*.safetensors", "pt": "*.pt", "npcache": "*.bin"}
"""Load formats that read only such files."""
_BESIDE_INDEX = ("consolidated*.safetensors", "mtp.safetensors")
_NO_FILES = ("dummy",)
_NOT_WEIGHTS = ("optimizer.bin", "optimizer.pt", "scaler.pt", "scheduler.pt", "training_args.bin")
"""Left by a training; engines pass them over."""


def local_directory(model: str, revision: str | None, cache_directory: str | None) -> Path | None:
    """The directory of `model`, which is a path or a repository of the hub; None if it is not on this machine yet.
    Raises `NotServable`."""
    if os.path.isdir(model):
        return Path(model)
    if os.path.exists(model):
        raise NotServable(f"{model} is a single file; only directories of safetensors have a digest")
    try:
        from huggingface_hub import snapshot_download

        found = snapshot_download(model, revision=revision, cache_dir=cache_directory, local_files_only=True)
    except (ImportError, OSError, ValueError):  # the hub's own errors derive from these
        return None
    return Path(found)


def files_read(directory: Path, load_format: str = "auto") -> tuple[Path, ...]:
    """The files that a load format of the engine reads: the safetensors files that the index names, or all of them;
    without any, what torch.save wrote. Engines and versions differ in "auto" where Mistral's format or a head that
    predicts several tokens lies beside the index; then both are covered. Raises `CheckpointError` and `NotServable`."""
    if load_format in _NO_FILES:
        raise NotServable(f"load format {load_format!r} reads no weights")
    if load_format in _PATTERNS:
        files = _matching(directory, _PATTERNS[load_format])
        if not files:
            raise CheckpointError(f"{directory} has no {_PATTERNS[load_format]} file")
        return files
    if (directory / "model.safetensors.index.json").is_file():
        indexed = checkpoint_files(directory, index_first=True)
        beside = [file for pattern in _BESIDE_INDEX for file in _matching(directory, pattern)]
        return (*indexed, *(file for file in beside if load_format == "auto" and file not in indexed))
    files = _matching(directory, "*.safetensors") or _matching(directory, "*.bin") or _matching(directory, "*.pt")
    return files or checkpoint_files(directory)  # whose error says what is missing


def _matching(directory: Path, pattern: str) -> tuple[Path, ...]:
    found = sorted(path for path in directory.glob(pattern) if path.is_file() and path.name not in _NOT_WEIGHTS)
    return tuple(found)
