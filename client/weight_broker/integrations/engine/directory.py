"""Where an engine's checkpoint is on this machine, and which of its files hold the weights."""

from __future__ import annotations

import os
from pathlib import Path

from weight_broker.integrations.checkpoint import checkpoint_files
from weight_broker.integrations.engine.engine import NotServable


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


def files_read(directory: Path) -> tuple[Path, ...]:
    """The files that are read: those that the index names, else every `*.safetensors`."""
    if (directory / "model.safetensors.index.json").is_file():
        return checkpoint_files(directory, index_first=True)
    files = tuple(sorted(path for path in directory.glob("*.safetensors") if path.is_file()))
    return files or checkpoint_files(directory)  # whose error names the missing file
