"""Which files of a directory a loader reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from weight_broker.integrations.checkpoint.header import CheckpointError, read_json

CONFIGURATION = "config.json"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TORCH_SINGLE, _TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_INDEX_SUFFIX = ".index.json"


def checkpoint_files(model_dir: Path, *, index_first: bool = False) -> tuple[Path, ...]:
    """The weight files that transformers reads: the one that the configuration names, `model.safetensors`, what its
    index names, `pytorch_model.bin`, what its index names. A directory with none of these has every `*.safetensors`.
    With `index_first` the index of safetensors files goes before all else. Raises `CheckpointError`."""
    if not model_dir.is_dir():
        raise CheckpointError(f"{model_dir} is not a directory")
    for name in _candidates(model_dir, index_first=index_first):
        path = model_dir / name
        if path.is_file():
            return indexed_files(path) if name.endswith(_INDEX_SUFFIX) else (path,)
    files = tuple(sorted(path for path in model_dir.glob("*.safetensors") if path.is_file()))
    if not files:
        raise CheckpointError(f"{model_dir} has no *.safetensors file and no {_TORCH_SINGLE}: it has no digest")
    return files


def description_files(model_dir: Path) -> tuple[Path, ...]:
    """The files beside the weights that decide which weights are read and what they mean."""
    names = (CONFIGURATION, _INDEX, _TORCH_INDEX)
    return tuple(path for path in (model_dir / name for name in names) if path.exists())


def indexed_files(index: Path) -> tuple[Path, ...]:
    """The files that an index names, which are beside it. Raises `CheckpointError`."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}, which is not a file of the same directory")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names {name}, which is missing; is the download complete?")
    return tuple(index.parent / name for name in names)


def _candidates(model_dir: Path, *, index_first: bool) -> Iterator[str]:
    if index_first:
        yield _INDEX
    elif (model_dir / CONFIGURATION).is_file():
        chosen = read_json(model_dir / CONFIGURATION).get("transformers_weights")
        if isinstance(chosen, str) and chosen:
            if Path(chosen).name != chosen:
                raise CheckpointError(f"{CONFIGURATION} names the weights {chosen!r}, not a file of the same directory")
            yield chosen
    yield from (_SINGLE, _INDEX, _TORCH_SINGLE, _TORCH_INDEX)
