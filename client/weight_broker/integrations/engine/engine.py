"""The engine, as a load sees it."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from weight_broker.integrations.checkpoint import CoveredWeights

if TYPE_CHECKING:
    from torch import nn

    from weight_broker.integrations.engine.options import Options
    from weight_broker.key import WeightSetKey


class NotServable(Exception):
    """The broker cannot serve this model; the text says why."""


class Engine(ABC):
    """One model of an engine, in one process."""

    def __init__(self) -> None:
        self.covered = CoveredWeights()

    logger: logging.Logger
    """A child of the engine's own, so that its handlers and levels apply."""
    model: str
    """The model's name on the command line."""
    platform: str = ""
    """The engine's name of the kind of device."""
    covered: CoveredWeights
    """What the key covers. `make_key` sets it."""
    rewrites_weights: bool = False
    """Whether post-processing is known to rewrite this model's weights on devices: what loading leaves is gone then."""
    shared_as_processed: frozenset[str] = frozenset()
    """Classes of quantization methods whose weights are shared as post-processing leaves them on this platform."""

    @abstractmethod
    def make_key(self, options: Options) -> WeightSetKey:
        """The key of this rank's weights, as loading leaves them. Called before the model is created. Raises
        `NotServable`, `CheckpointError`, `OSError`."""

    @abstractmethod
    def ranks(self, key: WeightSetKey) -> tuple[str, int, int] | None:
        """(engine, rank, count): a name that all ranks of this engine on this host use and no other engine has, this
        rank's number, and the number of ranks. None for an engine of one rank."""

    @abstractmethod
    def load_weights(self, model: nn.Module) -> None:
        """Read the weights from disk."""

    @abstractmethod
    def watch(self, model: nn.Module) -> None:
        """Let the engine's ways to change the weights of `model` retract them first."""

    def runtime_key(self, key: WeightSetKey) -> WeightSetKey:
        """The key of the same weights after post-processing."""
        raise NotServable(f"weights of {self.model} are not shared as post-processing leaves them")

    def load_dummy_weights(self, model: nn.Module) -> None:
        """Fill `model` with values that post-processing can work on."""
        raise NotServable(f"weights of {self.model} are not shared as post-processing leaves them")
