"""Tells the service manager the broker's status (sd_notify). Without a service manager every call does nothing."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

_SEND_SECONDS = 0.5


class Notifier:
    """Sends to the socket that the service manager names in the environment."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog_seconds = _watchdog_seconds(environment) if address else None
        """Longest interval between signs of life; None without a watchdog."""
        self._status = ""

    @property
    def active(self) -> bool:
        """True if there is a service manager."""
        return bool(self._address)

    def ready(self, status: str) -> None:
        """The broker answers calls."""
        self._status = status
        self._send(f"READY=1\nSTATUS={_one_line(status)}\nMAINPID={os.getpid()}")

    def status(self, status: str) -> None:
        """The broker's activity, for `systemctl status`. Sent only if it changed."""
        if status != self._status:
            self._status = status
            self._send(f"STATUS={_one_line(status)}")

    def watchdog(self) -> None:
        """Send a sign of life."""
        self._send("WATCHDOG=1")

    def stopping(self, status: str) -> None:
        """The broker ends."""
        self._status = status
        self._send(f"STOPPING=1\nSTATUS={_one_line(status)}")

    def _send(self, state: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(_SEND_SECONDS)
                sender.sendto(state.encode(), self._address)
        except OSError:  # a service manager that does not listen must not harm the service
            return


def _watchdog_seconds(environment: Mapping[str, str]) -> float | None:
    try:
        microseconds = int(environment.get("WATCHDOG_USEC", "0"))
        process = int(environment.get("WATCHDOG_PID") or os.getpid())
    except ValueError:
        return None
    return microseconds / 1e6 if microseconds > 0 and process == os.getpid() else None


def _one_line(text: str) -> str:
    return " ".join(text.split())
