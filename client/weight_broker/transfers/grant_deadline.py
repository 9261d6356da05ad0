"""Ends an acquire call on which nothing was granted in time.

gRPC's deadline of the call lies after the caller's where the broker writes to the caller's memory: it may take a while
to end its writing. Without a grant nothing is written, and the caller need not wait for that.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from weight_broker.connection.deadline import LAST_WORD_SECONDS


@contextmanager
def cancelled_without_grant(
    cancel: Callable[[], object], is_granted: Callable[[], bool], deadline: float
) -> Iterator[None]:
    """A broker that answers ends the call by itself: `cancel` is called a moment after `deadline` (monotonic
    seconds)."""

    def cancel_unless_granted() -> None:
        if not is_granted():
            cancel()

    seconds = max(deadline - time.monotonic(), 0.0) + LAST_WORD_SECONDS
    timer = threading.Timer(seconds, cancel_unless_granted)
    timer.daemon = True
    with contextlib.suppress(RuntimeError):  # no thread is left: gRPC's deadline ends the call, only later
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
