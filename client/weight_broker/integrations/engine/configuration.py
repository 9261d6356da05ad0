"""Reads an engine's configuration for keys and ranks."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")


def digest(value: object) -> str:
    """A short digest of anything that a configuration may hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def installed_version(distribution: str) -> str:
    """Empty if it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def has_experts(model_config: Any) -> bool:
    """Whether the model is a mixture of experts, by its engine's configuration of it."""
    known = getattr(model_config, "is_moe", None)
    if isinstance(known, bool):
        return known
    config = getattr(model_config, "hf_text_config", model_config.hf_config)
    for name in _COUNTS:
        count = getattr(config, name, 0)
        if max(count) if isinstance(count, list | tuple) and count else count:
            return True
    return False


def rewrites_weights(model_config: Any) -> bool:
    """Whether post-processing rewrites weights of the model on devices, by its engine's configuration of it."""
    return bool(getattr(model_config, "quantization", None)) or has_experts(model_config)
