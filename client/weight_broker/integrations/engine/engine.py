"""What a load has to know of the engine that it is part of."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from weight_broker.integrations.engine.options import Options
    from weight_broker.key import WeightSetKey


class NotServable(Exception):
    """The broker cannot serve this model; the text says why."""


class Engine(ABC):
    """An engine, in one process that loads one model."""

    logger: logging.Logger
    """A child of the engine's own, so that its handlers and levels apply."""
    model: str
    """The model, as the command line names it."""
    platform: str = ""
    """The kind of device that the engine runs on, as it calls it."""
    shared_as_processed: frozenset[str] = frozenset()
    """Classes of quantization methods whose weights are shared as post-processing leaves them on this platform."""

    @abstractmethod
    def make_key(self, options: Options) -> WeightSetKey:
        """The key of this rank's weights, as loading leaves them. Called before the model is made. Raises
        `NotServable`, `CheckpointError`, `OSError`."""

    @abstractmethod
    def ranks(self, key: WeightSetKey) -> tuple[str, int, int] | None:
        """The engine that this process is a rank of, as all its ranks on this host call it: a name that no other engine
        has, this rank's number among them, and how many there are. None for an engine of one rank."""

    @abstractmethod
    def load_weights(self, model: nn.Module) -> None:
        """Reads the weights from disk."""

    @abstractmethod
    def watch(self, model: nn.Module) -> None:
        """From now on whatever of the engine's changes the weights of `model` retracts them first."""

    def runtime_key(self, key: WeightSetKey) -> WeightSetKey:
        """The key of the same weights after post-processing."""
        raise NotServable(f"weights of {self.model} are not shared as post-processing leaves them")

    def load_dummy_weights(self, model: nn.Module) -> None:
        """Fills `model` with whatever post-processing can work on."""
        raise NotServable(f"weights of {self.model} are not shared as post-processing leaves them")
