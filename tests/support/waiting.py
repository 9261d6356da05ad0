"""Waiting for something that other processes bring about."""

from __future__ import annotations

import time
from collections.abc import Callable


def eventually(condition: Callable[[], object], *, within: float, every: float = 0.02) -> float:
    """Waits until `condition` is true and returns the seconds that took; fails after `within` seconds."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < within, f"not within {within} s"
        time.sleep(every)
    return time.monotonic() - begun
