"""Methods of an engine's classes that change weights: they retract publications first."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from weight_broker.integrations.engine import published

MARK = "__weight_broker__"

Around = Callable[[Callable[..., Any], str, Any, Any, Any], Any]
"""Called with the method, its name, `self`, and the arguments by position and by name."""


def wrap(owner: type, name: str, around: Around, logger: logging.Logger) -> None:
    """Replaces a method that `owner` itself defines."""
    method = vars(owner).get(name)
    if not callable(method) or hasattr(method, MARK):
        return

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(method, name, self, args, kwargs)

    setattr(wrapped, MARK, True)
    try:
        setattr(owner, name, wrapped)
    except (AttributeError, TypeError) as error:
        logger.warning("%s.%s cannot be watched: %s", owner.__name__, name, error)


def before_change(method: Callable[..., Any], name: str, self: Any, args: Any, kwargs: Any) -> Any:
    """For a method that may change any model of this process."""
    published.retract(f"{name} changes the weights")
    return method(self, *args, **kwargs)


def before_load_weights(method: Callable[..., Any], name: str, self: Any, args: Any, kwargs: Any) -> Any:
    """For a model's own method that loads weights into it."""
    published.retract("weights are loaded into the model", model=self)
    return method(self, *args, **kwargs)
