"""Which tensors make an engine's weight set, and what else the model's objects hold.

The weight set is the parameters and buffers under every name that they have, without tensors that a module computes
from the configuration alone (rotary caches, which models share besides) and tensors without memory. Modules, attention
backends and quantization methods also keep tensors as plain attributes. Before post-processing, the model's
construction alone determines those, so every process has them; a check shows that loading did not touch them.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

MAX_DEPTH = 3
_ENGINES = ("vllm", "vllm_ascend", "sglang")
_NOT_WEIGHTS = ("kv_cache",)
_OWN = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"})
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


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
    """Tensors that are kept as plain attributes of modules, or of the engine's objects in them."""
    for name, value in _attributes(model):
        if isinstance(value, torch.Tensor) and not name.endswith(_NOT_WEIGHTS) and not value.is_meta:
            yield name, value


def plain_state(model: nn.Module) -> dict[str, str]:
    """Numbers, flags and texts that the model's objects hold, by name."""
    return {name: repr(value) for name, value in _attributes(model) if not isinstance(value, torch.Tensor)}


def other_state(model: nn.Module) -> dict[str, str]:
    """The state of the model's objects besides the weight set, by name: numbers, flags, texts, and the type, shape and
    digest of hidden tensors."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in weight_tensors(model).values()}
    found = plain_state(model)
    for name, tensor in hidden_tensors(model):
        # Another view of a weight changes with the weight.
        if tensor.numel() and tensor.untyped_storage().data_ptr() not in weights:
            found[name] = f"{tensor.dtype} {tuple(tensor.shape)} {_digest(tensor)}"
    return found


def _digest(tensor: torch.Tensor) -> int:
    content = tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu()
    return zlib.crc32(content.numpy().tobytes())


def _attributes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        if is_computed(module):
            continue
        for name, value in _kept(module):
            if name not in _OWN and not (name.startswith("_") and name.endswith("_hooks")):
                yield from _inside(_join(prefix, name), value, seen, 0)


def _kept(owner: object) -> Iterator[tuple[str, Any]]:
    """The attributes of an object, without those that a property has computed and would compute again."""
    for name, value in vars(owner).items():
        is_remembered = isinstance(getattr(type(owner), name, None), functools.cached_property)
        if not (is_remembered and isinstance(value, _PLAIN)):
            yield name, value


def _inside(name: str, value: Any, seen: set[int], depth: int) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (torch.Tensor, *_PLAIN)):
        yield name, value
    elif isinstance(value, nn.Module | type) or depth == MAX_DEPTH:
        return
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _inside(f"{name}.{index}", item, seen, depth + 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _inside(f"{name}.{key}", item, seen, depth + 1)
    elif _is_engines(value) and id(value) not in seen:
        seen.add(id(value))
        for attribute, item in _kept(value):
            yield from _inside(f"{name}.{attribute}", item, seen, depth + 1)


def _is_engines(value: object) -> bool:
    """Whether the object is of the engine, has attributes and is no configuration."""
    package, _, rest = type(value).__module__.partition(".")
    is_configuration = rest.removeprefix("srt.").startswith(("config", "transformers_utils", "server_args"))
    return package in _ENGINES and not is_configuration and hasattr(value, "__dict__")


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
