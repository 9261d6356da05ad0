"""Ports of this host for servers that take their port on the command line."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_LOWEST = 16_384
_CLIENTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_TRIES = 200


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen on the port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def choose(host: str, *, but: int = 0) -> int:
    """A free port, not `but`. Below the kernel's ports for clients, so that it stays free while a server restarts.
    Raises OSError if there is none."""
    try:
        highest = int(_CLIENTS.read_text().split()[0]) - 1
    except (OSError, ValueError):
        highest = 32_767
    if highest - _LOWEST > _TRIES:
        for port in random.sample(range(_LOWEST, highest), _TRIES):
            if port != but and is_free(host, port):
                return port
    with socket.socket() as probe:
        probe.bind((host, 0))
        port = int(probe.getsockname()[1])
    return port if port != but else choose(host, but=but)
