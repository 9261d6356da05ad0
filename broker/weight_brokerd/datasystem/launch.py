"""Becomes another program, which the kernel kills as soon as its parent process ends:
`python -I launch.py PARENT LIBRARY_PATH PROGRAM ARGUMENT...`

A separate program without imports of the daemon: code between fork and exec in the daemon would not be safe.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Returns only if the parent has ended already."""
    parent, library_path, *command = sys.argv[1:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == int(parent):  # else the parent ended before prctl
        os.execve(command[0], command, {**os.environ, "LD_LIBRARY_PATH": library_path})


if __name__ == "__main__":
    main()
