"""The model loader: fills a model from a peer or lets SGLang read it from disk, and offers it once that is safe.

SGLang's own `load_model` stays in charge: it makes the model, has it load its weights, post-processes. While it does,
the model's `load_weights` is this loader's, and it looks at the weights again when `load_model` is about to return.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

from sglang.srt.model_loader.loader import DefaultModelLoader, get_model_loader
from torch import nn

from weight_broker.integrations.engine.load import Load, Reinitialise
from weight_broker.integrations.engine.options import parse
from weight_broker.integrations.sglang.engine import SglangEngine


class BrokerModelLoader(DefaultModelLoader):  # type: ignore[misc]  # SGLang may not be installed
    """The load format `weight_broker`."""

    def __init__(self, load_config: Any) -> None:
        self.options = parse(load_config.model_loader_extra_config)
        # Only formats that the command line does not accept may be anything but a text.
        disk = dataclasses.replace(
            load_config,
            load_format=self.options.fallback_load_format,
            model_loader_extra_config=dict(self.options.fallback_extra_config),
        )
        self._disk_config = disk
        self._load: Load | None = None
        self._engine: SglangEngine | None = None
        super().__init__(disk)

    def load_model(self, *, model_config: Any, device_config: Any, **options: Any) -> nn.Module:
        """The model with its weights, post-processed."""
        disk_loader = get_model_loader(self._disk_config, model_config)
        engine = SglangEngine(model_config, device_config, self._disk_config, self.download_model)
        load = Load(self.options, engine)
        if type(disk_loader) is not DefaultModelLoader:
            load.without_broker(
                f"{type(disk_loader).__name__} creates models differently; choose another load format for the disk"
            )
            loaded: nn.Module = disk_loader.load_model(
                model_config=model_config, device_config=device_config, **options
            )
            load.finish(loaded)
            return loaded
        load.prepare()
        self._load, self._engine = load, engine
        try:
            model = self._load_or_none(model_config, device_config, options)
            if model is None:
                gc.collect()  # the model whose weights are undefined
                model = self._load_model(model_config, device_config, options)
        except BaseException as error:
            load.abandon(error)
            raise
        finally:
            self._load = self._engine = None
        load.finish(model)
        return model

    def load_weights_and_postprocess(self, model: nn.Module, weights: Any, target_device: Any) -> None:
        """SGLang's own, in which the model is filled from a peer or from `weights`. Outside of `load_model` (a reload)
        always from `weights`, which nothing reads if they are not needed."""
        if self._load is None or self._engine is None:
            super().load_weights_and_postprocess(model, weights, target_device)
            return
        load, engine = self._load, self._engine
        read: Callable[..., Any] = model.load_weights  # type: ignore[assignment]

        def load_weights(weights: Any, *args: Any, **kwargs: Any) -> None:
            with engine.reading(lambda: read(engine.covered.noted(weights), *args, **kwargs)):
                load.weights(model)

        vars(model)["load_weights"] = load_weights  # in front of the class's
        try:
            super().load_weights_and_postprocess(model, weights, target_device)
        finally:
            del vars(model)["load_weights"]

    def _load_model(self, model_config: Any, device_config: Any, options: Any) -> nn.Module:
        model: nn.Module = super().load_model(model_config=model_config, device_config=device_config, **options)
        return model

    def _load_or_none(self, model_config: Any, device_config: Any, options: Any) -> nn.Module | None:
        """None if the model must be created again. Then the exception is gone, whose traceback holds the model."""
        try:
            return self._load_model(model_config, device_config, options)
        except Reinitialise as again:
            SglangEngine.logger.warning("the model is created again: %s", again)
            return None
