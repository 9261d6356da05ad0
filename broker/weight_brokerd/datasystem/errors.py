"""How a request for host objects ends if it does not succeed."""

from __future__ import annotations


class ObjectError(Exception):
    """The datasystem did not do it. The text has the engine's own words."""


class ObjectNotFound(ObjectError):
    """There is no such object now."""


class ObjectRefused(ObjectError):
    """The engine refused: no memory left, say. It goes on serving."""


class ObjectsUnavailable(ObjectError):
    """The worker does not answer, or the process for host objects does not start."""


class ObjectsLost(ObjectError):
    """The process ended in the middle of the request. A value that was to be stored may be there or not."""


class ObjectsTimeout(ObjectError):
    """The deadline passed, and the process that was at work was killed. A value that was to be stored may be there."""
