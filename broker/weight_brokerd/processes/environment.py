"""What child processes inherit of the daemon's environment."""

from __future__ import annotations

import os

_OURS_ALONE = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_FDS", "LISTEN_PID", "LD_PRELOAD")


def inherited() -> dict[str, str]:
    """All but what is between the daemon and its service manager, and preloads."""
    return {name: value for name, value in os.environ.items() if name not in _OURS_ALONE}
