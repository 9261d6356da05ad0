"""The engine's ways to change weights, wrapped once so that each retracts publications first."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

from weight_broker.integrations.engine import published
from weight_broker.integrations.engine.changes import before_change, before_load_weights, wrap

_WEIGHTS = "weights"
_CHANGES = (
    "update_weights_from_disk",
    "update_weights_from_distributed",
    "update_weights_from_tensor",
    "update_weights_from_ipc",
    "begin_weight_update",
    "load_weights_from_distributed",
)
_OWNERS = (
    "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager",
    "sglang.srt.managers.scheduler_update_weights_mixin.SchedulerUpdateWeightsMixin",
    "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater",
    "sglang.srt.model_executor.model_runner.ModelRunner",
)
"""Classes that have (some of) these methods, in one version or another."""
_REARRANGEMENT = "sglang.srt.eplb.expert_location_updater.ExpertLocationUpdater"

_logger = logging.getLogger("sglang.weight_broker")


def install(model: Any) -> None:
    """Wraps what can change the weights of `model`."""
    for owner in filter(None, map(_class, _OWNERS)):
        wrap(owner, "release_memory_occupation", _before_release, _logger)
        wrap(owner, "resume_memory_occupation", _after_resume, _logger)
        for name in _CHANGES:
            wrap(owner, name, before_change, _logger)
    wrap(type(model), "load_weights", before_load_weights, _logger)
    updater = _class(_REARRANGEMENT)
    if updater is not None:
        wrap(updater, "update", _before_rearrangement, _logger)


def _class(path: str) -> type | None:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    return found if isinstance(found, type) else None


def _before_release(method: Callable[..., Any], name: str, self: Any, args: Any, kwargs: Any) -> Any:
    if _concerns_weights(args, kwargs):
        published.retract("the engine releases its memory", for_sleep=True)
    return method(self, *args, **kwargs)


def _after_resume(method: Callable[..., Any], name: str, self: Any, args: Any, kwargs: Any) -> Any:
    result = method(self, *args, **kwargs)
    if _concerns_weights(args, kwargs):
        published.republish()
    return result


def _before_rearrangement(method: Callable[..., Any], name: str, self: Any, args: Any, kwargs: Any) -> Any:
    published.retract("experts are rearranged")
    return method(self, *args, **kwargs)


def _concerns_weights(args: Any, kwargs: Any) -> bool:
    """Whether the request is about weights: without tags it is about everything."""
    request = args[0] if args else next(iter(kwargs.values()), None)
    tags = getattr(request, "tags", None)
    return not tags or _WEIGHTS in tags
