"""Memory as instances share it, made by tests."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from pathlib import Path

ALL_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def memfd(content: bytes = b"weights", *, seals: int = ALL_SEALS, name: str = "weights") -> int:
    """A memfd with `content`; the caller closes it."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(descriptor, content)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def open_descriptors(targets: Iterable[str] = ("/memfd:",)) -> int:
    """How many descriptors this process has whose target begins with one of `targets`."""
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found += os.readlink(entry).startswith(tuple(targets))
        except FileNotFoundError:  # the directory's own descriptor
            continue
    return found
