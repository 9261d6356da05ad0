"""Descriptors 0 to 2 of a process that has closed them.

The next files that it opens get these numbers: a print would then write into the socket to the broker, or into
published memory before its seal.
"""

from __future__ import annotations

import contextlib
import os

_DESCRIPTORS = (0, 1, 2)


def occupy() -> None:
    """Open /dev/null where they are closed. A program that is executed does not inherit it."""
    for descriptor in _DESCRIPTORS:
        try:
            os.fstat(descriptor)
        except OSError:
            _open_null(descriptor)


def _open_null(wanted: int) -> None:
    with contextlib.suppress(OSError):  # without room for a descriptor nothing else can be opened either
        opened = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        if opened != wanted:  # another thread was faster
            os.close(opened)
