"""How others learn that a publication that waits for a check has ended waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Waiting:
    """The end of the wait of one publication."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._refusal: str | None = None
        self._actions: list[Callable[[str], None]] = []

    def then(self, action: Callable[[str], None]) -> None:
        """Call `action` at the end with the reason for which nothing was published; empty if it was."""
        with self._lock:
            refusal = self._refusal
            if refusal is None:
                self._actions.append(action)
        if refusal is not None:
            action(refusal)

    def end(self, refusal: str) -> None:
        """For the thread that waits."""
        with self._lock:
            self._refusal = refusal
        for action in self._actions:
            action(refusal)
