"""Why the broker cannot start."""

from __future__ import annotations


class StartError(RuntimeError):
    """The broker cannot start; the message says why and what to do."""
