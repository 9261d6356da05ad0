from __future__ import annotations


class StartError(RuntimeError):
    """The broker cannot start. The message says why and what to do."""
