"""How long one step of a call may wait for the broker, as the whole call has one deadline (monotonic seconds)."""

from __future__ import annotations

import time

REQUEST_TIMEOUT_SECONDS = 10.0
"""A broker that leaves one request unanswered for so long hangs."""
LAST_WORD_SECONDS = 0.25
"""For reports and for undoing a step, also after the deadline: what a broker that answers needs at most."""


def seconds_until(deadline: float | None, at_most: float = REQUEST_TIMEOUT_SECONDS) -> float:
    """The timeout of a step that the call cannot do without."""
    return at_most if deadline is None else min(max(deadline - time.monotonic(), 0.001), at_most)


def last_word(deadline: float | None, at_most: float = REQUEST_TIMEOUT_SECONDS) -> float:
    """The timeout of a step that only tells the broker how the call ended."""
    return max(seconds_until(deadline, at_most), LAST_WORD_SECONDS)
