"""A process that keeps a processor as busy as a flood does, and touches no broker: `python -m benchmarks.busy SHARE`.

SHARE is the part of a processor, 0 to 1. It prints `busy` and goes on until it is killed.
"""

from __future__ import annotations

import sys
import time

_PERIOD_SECONDS = 0.002
"""Short, as a flood computes a little for each answer."""


def main() -> None:
    """See the module."""
    share = min(max(float(sys.argv[1]), 0.0), 1.0)
    print("busy", flush=True)
    while True:
        begun = time.thread_time()
        while time.thread_time() - begun < share * _PERIOD_SECONDS:
            pass
        if share < 1:
            time.sleep((1 - share) * _PERIOD_SECONDS)


if __name__ == "__main__":
    main()
