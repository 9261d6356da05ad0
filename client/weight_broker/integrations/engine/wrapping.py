"""Methods of an engine's classes that are made to do something more, once each."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

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
