"""SGLang, as a load sees it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from weight_broker.integrations.checkpoint import CoveredWeights
from weight_broker.integrations.engine.configuration import rewrites_weights
from weight_broker.integrations.engine.directory import files_read, local_directory
from weight_broker.integrations.engine.engine import Engine, NotServable
from weight_broker.integrations.engine.options import Options
from weight_broker.integrations.sglang import hooks
from weight_broker.integrations.sglang.key import weight_set_key
from weight_broker.integrations.sglang.ranks import engine_ranks
from weight_broker.key import WeightSetKey


class SglangEngine(Engine):
    """One model of one scheduler process. Nothing is shared as post-processing leaves it."""

    logger = logging.getLogger("sglang.weight_broker")

    def __init__(
        self, model_config: Any, device_config: Any, load_config: Any, download: Callable[[Any], None]
    ) -> None:
        super().__init__()
        self.model = str(model_config.model_path)
        self.platform = str(device_config.device_type)
        self.rewrites_weights = rewrites_weights(model_config)
        self._model_config = model_config
        self._load_config = load_config
        self._download = download
        self._read: Callable[[], None] | None = None

    @contextmanager
    def reading(self, read: Callable[[], None]) -> Iterator[None]:
        """Reads the weights from disk; set while the model is being filled."""
        self._read = read
        try:
            yield
        finally:
            self._read = None

    def make_key(self, options: Options) -> WeightSetKey:
        config = self._model_config
        where = (self.model, getattr(config, "revision", None), self._load_config.download_dir)
        directory = local_directory(*where)
        if directory is None:
            self._download(config)
            directory = local_directory(*where)
        if directory is None:
            raise NotServable("its checkpoint is not on this machine, or not where the hub keeps it")
        self.covered = CoveredWeights(files_read(directory, options.fallback_load_format))
        return weight_set_key(config, options, directory, self.platform, self._load_config, self.covered.files)

    def ranks(self, key: WeightSetKey) -> tuple[str, int, int] | None:
        return engine_ranks(key.model, str(key.role))

    def load_weights(self, model: nn.Module) -> None:
        if self._read is None:
            raise AssertionError(f"{self.model} is filled outside of its load")
        self._read()

    def watch(self, model: nn.Module) -> None:
        hooks.install(model)
