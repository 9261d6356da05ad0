"""Becomes another program, which the kernel kills as soon as the process that started it ends, however that ends:
`python -I launch.py PARENT LIBRARY_PATH PROGRAM ARGUMENT...`

A program of its own, without imports of ours: what runs between fork and exec in the daemon must not.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Does not return unless the parent is gone already."""
    parent, library_path, *command = sys.argv[1:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == int(parent):  # else it ended before the kernel was told
        os.execve(command[0], command, {**os.environ, "LD_LIBRARY_PATH": library_path})


if __name__ == "__main__":
    main()
