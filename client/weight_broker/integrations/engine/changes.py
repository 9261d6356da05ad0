"""What is done around the methods of an engine that change weights: what is published is retracted first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from weight_broker.integrations.engine import published


def before_change(method: Callable[..., Any], name: str, self: Any, args: Any, kwargs: Any) -> Any:
    """For a method that may change any model of this process."""
    published.retract(f"{name} changes the weights")
    return method(self, *args, **kwargs)


def before_load_weights(method: Callable[..., Any], name: str, self: Any, args: Any, kwargs: Any) -> Any:
    """For a model's own method that loads weights into it."""
    published.retract("weights are loaded into the model", model=self)
    return method(self, *args, **kwargs)
