"""The model loader: fills a model from a peer or lets vLLM read it from disk, and offers it once that is safe.

vLLM's own `load_model` stays in charge: it makes the model, calls `load_weights`, post-processes. This loader answers
`load_weights`, and looks at the weights again when `load_model` is about to return.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
from typing import Any

from torch import nn
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from weight_broker.integrations.engine.load import Load, Reinitialise
from weight_broker.integrations.engine.options import parse
from weight_broker.integrations.vllm.engine import VllmEngine
from weight_broker.integrations.vllm.registries import Registries

_logger = logging.getLogger("vllm.weight_broker")


class BrokerModelLoader(BaseModelLoader):  # type: ignore[misc]  # vLLM may not be installed
    """The load format `weight_broker`."""

    def __init__(self, load_config: Any) -> None:
        super().__init__(load_config)
        self.options = parse(load_config.model_loader_extra_config)
        self._disk_loader: BaseModelLoader | None = None
        self._load: Load | None = None

    @property
    def disk_loader(self) -> BaseModelLoader:
        """vLLM's loader that reads from disk."""
        if self._disk_loader is None:
            config = dataclasses.replace(
                self.load_config,
                load_format=self.options.fallback_load_format,
                model_loader_extra_config=dict(self.options.fallback_extra_config),
            )
            self._disk_loader = get_model_loader(config)
        return self._disk_loader

    def download_model(self, model_config: Any) -> None:
        """For vLLM: downloads the checkpoint if necessary."""
        self.disk_loader.download_model(model_config)

    def load_model(self, vllm_config: Any, model_config: Any, **options: Any) -> nn.Module:
        """The model with its weights, post-processed. `options`: further arguments of this version of vLLM
        (`prefix`)."""
        load = Load(self.options, VllmEngine(self.disk_loader, vllm_config, model_config, self.load_config))
        if type(self.disk_loader).load_model is not BaseModelLoader.load_model:
            disk_format = self.options.fallback_load_format
            load.without_broker(f"load format {disk_format!r} creates models differently; set fallback_load_format")
            loaded: nn.Module = self.disk_loader.load_model(vllm_config, model_config, **options)
            load.finish(loaded)
            return loaded
        load.prepare()
        remembered = Registries(vllm_config.compilation_config)
        self._load = load
        try:
            model = self._load_or_none(vllm_config, model_config, options)
            if model is not None and load.is_to_fill and not load.fill(model):
                model = None
            if model is None:
                gc.collect()  # the model whose weights are undefined
                remembered.restore()
                model = self._load_model(vllm_config, model_config, options)
        except BaseException as error:
            load.abandon(error)
            raise
        finally:
            self._load = None
        load.finish(model)
        return model

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Outside of `load_model` (a reload) always from disk."""
        if self._load is None:
            self.disk_loader.load_weights(model, model_config)
        else:
            self._load.weights(model)

    def __getattr__(self, name: str) -> Any:
        # Methods that later versions of vLLM call on their loaders, for example `get_all_weights` for a reload.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.disk_loader, name)

    def _load_model(self, vllm_config: Any, model_config: Any, options: Any) -> nn.Module:
        model: nn.Module = super().load_model(vllm_config, model_config, **options)
        return model

    def _load_or_none(self, vllm_config: Any, model_config: Any, options: Any) -> nn.Module | None:
        """None if the model must be created again. Then the exception is gone, whose traceback holds the model."""
        load = self._load
        assert load is not None
        try:
            return self._load_model(vllm_config, model_config, options)
        except Reinitialise as again:
            _logger.warning("the model is created again: %s", again)
        except Exception as error:  # of any kind: the same post-processing may work on the real weights
            if not load.is_to_fill:
                raise
            load.dummies_failed(error)
        return None
