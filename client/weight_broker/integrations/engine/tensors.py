"""Which tensors make an engine's weight set, and what else the model's objects hold.

The weight set is the parameters and buffers under every name that they have, without tensors that a module computes
from the configuration alone (rotary caches, which models share besides) and tensors without memory. Modules, attention
backends and quantization methods also keep tensors as plain attributes. Before post-processing, the model's
construction alone determines those, so every process has them; a check shows that loading did not touch them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from weight_broker.errors import InvalidArgument
from weight_broker.integrations.modules.digests import digest
from weight_broker.integrations.modules.walk import PLAIN, Walk

_NOT_WEIGHTS = ("kv_cache",)
_ENGINES = ("vllm", "vllm_ascend", "sglang", "transformers")
_NO_STATE = (
    "ascend_config",
    "compilation",
    "config",
    "distributed",
    "logger",
    "server_args",
    "transformers_utils",
    "v1.core",
    "v1.engine",
    "v1.executor",
    "v1.worker",
)
"""Packages of engines whose objects are configurations, groups of processes or workers."""


def weight_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weight set: tensors by name, tied ones under all their names."""
    found: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        computed = is_computed(module)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found[_join(prefix, name)] = parameter
        for name, buffer in module._buffers.items():
            if buffer is not None and not computed:
                found[_join(prefix, name)] = buffer
    return {name: tensor for name, tensor in found.items() if not tensor.is_meta and tensor.numel()}


def without_memory(model: nn.Module) -> list[str]:
    """Names of the parameters on the meta device."""
    return [name for name, parameter in model.named_parameters() if parameter.is_meta]


def is_computed(module: nn.Module) -> bool:
    """Whether the module's buffers follow from the configuration."""
    return ".rotary_embedding" in type(module).__module__


def hidden_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that are kept besides parameters and buffers, anywhere that can be reached from the model."""
    for name, value in _kept(model):
        if isinstance(value, torch.Tensor) and not value.is_meta:
            yield name, value


def plain_state(model: nn.Module) -> dict[str, str]:
    """Numbers, flags and texts that the model's objects hold, by name, and digests of state that no tensor has."""
    return {name: _text(name, value) for name, value in _kept(model) if not isinstance(value, torch.Tensor)}


def other_state(model: nn.Module) -> dict[str, str]:
    """The state of the model's objects besides the weight set, by name: numbers, flags, texts, and the type, shape and
    digest of hidden tensors."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in weight_tensors(model).values()}
    found: dict[str, str] = {}
    for name, value in _kept(model):
        if not isinstance(value, torch.Tensor):
            found[name] = _text(name, value)
        # Another view of a weight changes with the weight.
        elif not value.is_meta and value.numel() and value.untyped_storage().data_ptr() not in weights:
            found[name] = f"{value.dtype} {tuple(value.shape)} {digest(name, value)}"
    return found


def _kept(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for owner, name, value in Walk(model, passes_over=_is_no_state).leaves():
        if not is_computed(owner) and not set(name.split(".")) & set(_NOT_WEIGHTS):
            yield name, value


def _is_no_state(value: object) -> bool:
    package, _, rest = type(value).__module__.partition(".")
    if package not in _ENGINES:
        return False
    return package == "transformers" or rest.removeprefix("srt.").startswith(_NO_STATE)


def _text(name: str, value: Any) -> str:
    if isinstance(value, torch.device):
        return value.type  # the same on every rank and in every container
    if isinstance(value, PLAIN):
        return repr(value)
    try:
        return digest(name, value)
    except InvalidArgument:
        return type(value).__name__


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
