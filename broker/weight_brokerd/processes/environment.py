"""The environment that child processes inherit."""

from __future__ import annotations

import os

_OURS_ALONE = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_FDS", "LISTEN_PID", "LD_PRELOAD")


def inherited() -> dict[str, str]:
    """The daemon's environment without preloads and variables of the service manager."""
    return {name: value for name, value in os.environ.items() if name not in _OURS_ALONE}
