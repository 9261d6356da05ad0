"""The engine's ways to change weights, wrapped so that each retracts publications first.

The methods are wrapped on the classes that are there when something is published, those of vllm-ascend and of worker
extensions included; once each.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from weight_broker.integrations.engine import published
from weight_broker.integrations.engine.changes import before_change, before_load_weights, wrap

_CHANGES = (
    "update_weights",
    "start_weight_update",
    "start_draft_weight_update",
    "reload_weights",
    "reset_weights",
    "elastic_ep_execute",
    "discard",
    "checkpoint_prepare",
)
"""Methods of workers that change or move the weights."""

_logger = logging.getLogger("vllm.weight_broker")


def install(model: Any) -> None:
    """Wraps what can change the weights of `model`."""
    from vllm.v1.worker.worker_base import WorkerBase

    for worker in _with_subclasses(WorkerBase):
        wrap(worker, "sleep", _before_sleep, _logger)
        wrap(worker, "wake_up", _after_wake_up, _logger)
        for name in _CHANGES:
            wrap(worker, name, before_change, _logger)
    wrap(type(model), "load_weights", before_load_weights, _logger)
    try:
        from vllm.distributed.eplb.eplb_state import EplbState
    except ImportError:
        return
    wrap(EplbState, "rearrange", _before_rearrangement, _logger)


def _before_sleep(method: Callable[..., Any], name: str, self: Any, args: Any, kwargs: Any) -> Any:
    published.retract("the engine goes to sleep", for_sleep=True)
    return method(self, *args, **kwargs)


def _after_wake_up(method: Callable[..., Any], name: str, self: Any, args: Any, kwargs: Any) -> Any:
    result = method(self, *args, **kwargs)
    tags = kwargs.get("tags", args[0] if args else None)
    if tags is None or "weights" in tags:
        published.republish()
    return result


def _before_rearrangement(method: Callable[..., Any], name: str, self: Any, args: Any, kwargs: Any) -> Any:
    # A rehearsal moves nothing. Its argument is the first or the second, by version, and called by name.
    if not kwargs.get("is_profile", False):
        published.retract("experts are rearranged")
    return method(self, *args, **kwargs)


def _with_subclasses(owner: type[Any]) -> Iterator[type[Any]]:
    yield owner
    subclasses: list[type[Any]] = owner.__subclasses__()
    for entry in subclasses:
        yield from _with_subclasses(entry)
