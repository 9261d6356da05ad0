"""Waiting for something that other processes bring about."""

from __future__ import annotations

import time
from collections.abc import Callable


def eventually(condition: Callable[[], object], *, within: float = 60.0, every: float = 0.02) -> None:
    """Waits until `condition` is true. Fails after `within` seconds: what happens on a busy machine happens late, and
    what never happens may cost time."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"not within {within} s"
        time.sleep(every)
