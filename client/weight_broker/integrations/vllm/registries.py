"""Registries that making a model fills. They are put back before the model is made again: vLLM refuses to register a
layer twice, and vllm-ascend would go on with the layers of the first model."""

from __future__ import annotations

import sys
from typing import Any

_OF_THE_CONFIGURATION = ("static_forward_context", "static_all_moe_layers")
_OF_MODULES = (
    ("vllm.model_executor.layers.rotary_embedding", "_ROPE_DICT"),
    ("vllm_ascend.eplb.adaptor.vllm_adaptor", "VllmEplbAdaptor._registered_moe_layers"),
)
"""Dictionaries and lists that live as long as the process."""


class Registries:
    """The registries as they were before the model."""

    def __init__(self, compilation_config: Any) -> None:
        found = [getattr(compilation_config, name, None) for name in _OF_THE_CONFIGURATION]
        found += [_registry(module, path) for module, path in _OF_MODULES]
        self._before = [(registry, registry.copy()) for registry in found if isinstance(registry, dict | list)]

    def restore(self) -> None:
        """Put them back."""
        for registry, before in self._before:
            registry.clear()
            if isinstance(registry, dict):
                registry.update(before)
            else:
                registry.extend(before)


def _registry(module: str, path: str) -> Any:
    """None in a version that has no such registry."""
    found: Any = sys.modules.get(module)
    for name in path.split("."):
        found = getattr(found, name, None)
    return found
