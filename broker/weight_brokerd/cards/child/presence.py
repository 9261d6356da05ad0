"""In a card process: whether the process has been running all the time.

The datasystem worker silently declares a client dead that does not report. After the process was stopped, starved or
suspended for that long, its client looks unchanged, but its calls wait for ever.
"""

from __future__ import annotations

import threading
import time

AWAY_SECONDS = 3.0
"""The shortest time for which a worker may be configured to wait for a client."""
_TICK_SECONDS = 1.0


class Presence:
    """Remembers whether this process did not run for longer than a worker may wait."""

    def __init__(self, away_seconds: float = AWAY_SECONDS) -> None:
        self._away_seconds = away_seconds
        self._lock = threading.Lock()
        self._last = _now()
        self._longest = 0.0
        threading.Thread(target=self._tick, name="presence", daemon=True).start()

    @property
    def away(self) -> float:
        """The longest time, in seconds, that this process did not run; 0 if it was never too long."""
        return self._look()

    def _tick(self) -> None:
        while True:
            time.sleep(_TICK_SECONDS)
            self._look()

    def _look(self) -> float:
        with self._lock:
            now = _now()
            self._longest = max(self._longest, now - self._last - _TICK_SECONDS)
            self._last = now
            return self._longest if self._longest > self._away_seconds else 0.0


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)  # goes on while the machine sleeps
