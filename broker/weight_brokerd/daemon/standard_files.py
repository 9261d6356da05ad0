"""The process's descriptors: how many it may have, and the first three."""

from __future__ import annotations

import contextlib
import os
import resource


def allow_many_files() -> None:
    """Raises the soft limit of open files to the hard one: every instance needs two, every region one."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def open_standard_streams() -> None:
    """Open what is closed of descriptors 0 to 2: else a socket or the lock file becomes standard error, and the log is
    written into it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the kernel takes the lowest free number
