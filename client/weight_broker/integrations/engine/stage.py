"""The stage in which weights are shared: `loaded`, before post-processing, or `runtime`, after it.

`loaded` wherever possible, since every engine then does its own post-processing. Some methods replace weights by packed
ones, whose form is the same in every engine of the same version on the same platform. Methods on the list are shared
packed: a test shows for each that an engine filled with packed weights gives the same answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Set

import torch
from torch import nn

from weight_broker.integrations.engine.engine import Engine
from weight_broker.integrations.engine.tensors import hidden_tensors, plain_state, weight_tensors

STATE = "weight_broker.state"
"""Name of the tensor with the digest of the state that post-processing left besides tensors."""


def is_shared_as_processed(model: nn.Module, methods: Set[str]) -> bool:
    """Whether one of the methods on the list has weights in this model."""
    return any(_is_on_list(module, methods) for module in model.modules())


def processed_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weight set after post-processing: tensors that are kept as plain attributes too, and a digest of the rest."""
    found = weight_tensors(model)
    kinds = {tensor.device for tensor in found.values()}
    weights = {tensor.untyped_storage().data_ptr() for tensor in found.values()}
    for name, tensor in hidden_tensors(model):
        if tensor.device in kinds and tensor.numel() and tensor.untyped_storage().data_ptr() not in weights:
            found.setdefault(name, tensor)
    found[STATE] = state_digest(model)
    return found


def state_digest(model: nn.Module) -> torch.Tensor:
    """A digest of the numbers, flags and texts that the model's objects hold, as a tensor beside the weights."""
    text = "\n".join(f"{name}={value}" for name, value in sorted(plain_state(model).items()))
    device = next((tensor.device for tensor in weight_tensors(model).values()), torch.device("cpu"))
    return torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8, device=device)


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
