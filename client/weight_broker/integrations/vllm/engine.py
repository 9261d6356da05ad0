"""vLLM, as a load sees it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from weight_broker.integrations.checkpoint import CoveredWeights
from weight_broker.integrations.engine.configuration import rewrites_weights
from weight_broker.integrations.engine.directory import files_read
from weight_broker.integrations.engine.engine import Engine, NotServable
from weight_broker.integrations.engine.options import Options
from weight_broker.integrations.vllm import hooks
from weight_broker.integrations.vllm.key import checkpoint_directory, platform_name, runtime_key, weight_set_key
from weight_broker.integrations.vllm.ranks import engine_ranks
from weight_broker.key import WeightSetKey

SHARED_AS_PROCESSED: Mapping[str, frozenset[str]] = {
    "cpu": frozenset({"UnquantizedFusedMoEMethod"}),  # tests/e2e/vllm/test_vllm_answers.py, mixture-of-experts
}
"""Classes of quantization methods, by platform."""


class VllmEngine(Engine):
    """One model of one worker."""

    logger = logging.getLogger("vllm.weight_broker")

    def __init__(self, disk_loader: Any, vllm_config: Any, model_config: Any, load_config: Any) -> None:
        super().__init__()
        self.model = str(model_config.model)
        self.platform = platform_name()
        self.rewrites_weights = rewrites_weights(model_config)
        self.shared_as_processed = SHARED_AS_PROCESSED.get(self.platform, frozenset())
        self._disk_loader = disk_loader
        self._vllm_config = vllm_config
        self._model_config = model_config
        self._load_config = load_config

    def make_key(self, options: Options) -> WeightSetKey:
        directory = checkpoint_directory(self._model_config, self._load_config)
        if directory is None:
            self._disk_loader.download_model(self._model_config)
            directory = checkpoint_directory(self._model_config, self._load_config)
        if directory is None:
            raise NotServable("its checkpoint is not on this machine")
        self.covered = CoveredWeights(files_read(directory, options.fallback_load_format))
        return weight_set_key(self._vllm_config, self._model_config, options, directory, self.covered.files)

    def runtime_key(self, key: WeightSetKey) -> WeightSetKey:
        return runtime_key(key, self._vllm_config)

    def ranks(self, key: WeightSetKey) -> tuple[str, int, int] | None:
        return engine_ranks(self._vllm_config, key.model, str(key.role))

    def load_weights(self, model: nn.Module) -> None:
        loader = self._disk_loader
        read = getattr(loader, "get_all_weights", None)
        if read is None:
            loader.load_weights(model, self._model_config)
            return
        vars(loader)["get_all_weights"] = lambda *args, **kwargs: self.covered.noted(read(*args, **kwargs))
        try:
            loader.load_weights(model, self._model_config)
        finally:
            del vars(loader)["get_all_weights"]

    def load_dummy_weights(self, model: nn.Module) -> None:
        from vllm.model_executor.model_loader import get_model_loader

        config = dataclasses.replace(self._load_config, load_format="dummy", model_loader_extra_config={})
        get_model_loader(config).load_weights(model, self._model_config)

    def watch(self, model: nn.Module) -> None:
        hooks.install(model)
