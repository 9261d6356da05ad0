"""The stage in which weights are shared: `loaded`, before post-processing, or `runtime`, after it.

`loaded` wherever possible, since every engine then does its own post-processing. Some methods replace weights by packed
ones, whose form is the same in every engine of the same version on the same platform. Methods on the list are shared
packed: a test shows for each that an engine filled with packed weights gives the same answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Set

import torch
from torch import nn

from weight_broker.integrations.engine.engine import Engine
from weight_broker.integrations.engine.tensors import hidden_tensors, plain_state, weight_tensors
from weight_broker.integrations.modules.digests import digest

_DIGEST_CHARACTERS = 12


def is_shared_as_processed(model: nn.Module, methods: Set[str]) -> bool:
    """Whether one of the methods on the list has weights in this model."""
    return any(_is_on_list(module, methods) for module in model.modules())


def processed_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weight set after post-processing: tensors that are kept besides parameters and buffers too. The rest of the
    state is in names of empty tensors: layouts of models with other state differ, so that no such model is filled, and
    the error names the object."""
    found = weight_tensors(model)
    hidden = dict(hidden_tensors(model))
    kinds = {tensor.device for tensor in (found or hidden).values()}
    weights = {tensor.untyped_storage().data_ptr() for tensor in found.values()}
    state = plain_state(model)
    for name, tensor in hidden.items():
        if not tensor.numel() or tensor.untyped_storage().data_ptr() in weights:
            continue
        if tensor.device in kinds:
            found.setdefault(name, tensor)
        else:
            state[name] = f"{tensor.dtype} {tuple(tensor.shape)} {digest(name, tensor)}"
    device = next(iter(kinds), torch.device("cpu"))
    return found | {name: torch.empty(0, dtype=torch.uint8, device=device) for name in _state_names(state)}


def _state_names(state: Mapping[str, str]) -> Iterator[str]:
    """A name with a digest for each object that has state."""
    by_object: dict[str, list[str]] = {}
    for name, text in sorted(state.items()):
        by_object.setdefault(name.rpartition(".")[0], []).append(f"{name}={text}")
    for owner, lines in by_object.items():
        found = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:_DIGEST_CHARACTERS]
        yield f"{owner}.state-{found}" if owner else f"state-{found}"


def processed_refusal(model: nn.Module, engine: Engine, moved: list[str], vanished_bytes: int) -> str:
    """Why the processed weights cannot be published; empty if they can."""
    if vanished_bytes > 0:
        return f"after post-processing {vanished_bytes} bytes of weights are in no tensor any more"
    for name in moved:
        owner = model.get_submodule(name.rpartition(".")[0])
        if not _is_on_list(owner, engine.shared_as_processed):
            method = type(getattr(owner, "quant_method", None)).__name__
            return (
                f"post-processing moved {name}, and weights that {method} processes are not shared on {engine.platform}"
            )
    return ""


def _is_on_list(module: nn.Module, methods: Set[str]) -> bool:
    return type(getattr(module, "quant_method", None)).__name__ in methods
