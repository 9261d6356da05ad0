"""Are the files that a key covers those of a model, and those that were read? If not, another loader's rule chose them:
rules for files differ between loaders and versions, the names of tensors do not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from weight_broker.integrations.checkpoint.header import CheckpointError, checkpoint_tensors

_NAMED = 8


def unlike_model(files: Sequence[Path], parameters: Mapping[str, int]) -> str:
    """Why the files cannot have all of the model's parameters (elements by name, each tied one once); empty if they
    may. Loaders rename, split and merge tensors: what stays are the number of elements and the ends of some names. Says
    nothing of files that torch.save wrote. Raises `CheckpointError` and `OSError`."""
    if any(file.suffix != ".safetensors" for file in files):
        return ""
    tensors = [tensor for file in files for tensor in checkpoint_tensors(file)]
    found, wanted = sum(math.prod(tensor.shape) for tensor in tensors), sum(parameters.values())
    if found < wanted:
        lacking = sorted(set(parameters) - {tensor.name for tensor in tensors})[:_NAMED]
        return f"the files of the checkpoint have {found} numbers, and the model {wanted}: {', '.join(lacking)}"
    if parameters and not _ends(tensor.name for tensor in tensors) & _ends(parameters):
        return f"the files of the checkpoint have other tensors than the model, for example {tensors[0].name}"
    return ""


def _ends(names: Iterable[str]) -> set[str]:
    return {".".join(name.split(".")[-2:]) for name in names}


class CoveredWeights:
    """The files that the digest in a key covers, and the tensors that were then read from disk."""

    def __init__(self, files: Sequence[Path] = ()) -> None:
        self.files = tuple(files)
        self._read: set[str] = set()

    def noted(self, weights: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """The same tensors; each name is noted when its tensor is read."""
        for name, tensor in weights:
            self._read.add(name)
            yield name, tensor

    def refusal(self) -> str:
        """Why the weights that were read are not those of the key; empty if they are, as far as their names say. Files
        that torch.save wrote are not compared."""
        if not self.files or any(file.suffix != ".safetensors" for file in self.files):
            return ""
        try:
            covered = {tensor.name for file in self.files for tensor in checkpoint_tensors(file)}
        except (CheckpointError, OSError) as error:
            return f"the files of the key cannot be read again: {error}"
        others = sorted(self._read - covered)
        if not others:
            return ""
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        return f"the loader read tensors that are in no file of the key: {', '.join(others[:_NAMED])}{more}"
