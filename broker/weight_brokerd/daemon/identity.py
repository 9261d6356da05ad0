"""The host's id, and numbers that never repeat."""

from __future__ import annotations

import hashlib
import socket
import time
from pathlib import Path

# The machine id is confidential (machine-id(5)); a digest keyed by the application is not.
_APPLICATION = b"weight-broker host id 1\0"
_MACHINE_ID_LENGTH = 32
_HOST_ID_LENGTH = 32

GENERATIONS_PER_RUN = 1 << 40
_GENERATION_LIMIT = 1 << 64


def host_id(configured: str = "", *, machine_id_file: Path = Path("/etc/machine-id")) -> str:
    """The host's id, stable over restarts: the configured id, else from the machine id, else from the host's name."""
    if configured:
        return configured
    try:
        machine_id = machine_id_file.read_text().strip()
    except (OSError, UnicodeDecodeError):
        machine_id = ""
    # An image that was never booted has an empty file or the word "uninitialized".
    if len(machine_id) != _MACHINE_ID_LENGTH:
        machine_id = "name " + socket.gethostname()
    return hashlib.sha256(_APPLICATION + machine_id.encode()).hexdigest()[:_HOST_ID_LENGTH]


def generation_range(mark: int, *, now_nanoseconds: int | None = None) -> range:
    """The generations that this run may use, all above what earlier runs used.

    `mark` is the end of the previous run's range, kept in the lock file. The clock alone would repeat after it is
    stepped back; the mark alone would repeat after the runtime directory is emptied (a reboot).
    """
    now = time.time_ns() if now_nanoseconds is None else now_nanoseconds
    first = max(now, mark, 1)
    if first + GENERATIONS_PER_RUN > _GENERATION_LIMIT:  # only a damaged record or clock can be that far in the future
        first = 1 if now + GENERATIONS_PER_RUN > _GENERATION_LIMIT else max(now, 1)
    return range(first, first + GENERATIONS_PER_RUN)
