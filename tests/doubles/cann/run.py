"""Runs a command on an emulated host: `python -m doubles.cann.run [--cards N] [--visible LIST] COMMAND ...`.

What the command starts finds the double where it would find Ascend's driver: brokers by their settings
(`cards.library_path`, `cards.preload`), which `weight-broker demo` and `ascend-check` hand to their own processes too.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys

from doubles.cann.build import CannotBuild, build
from doubles.cann.control import CannHost


def variables(host: CannHost, *, visible: str | None = None) -> dict[str, str]:
    """For a command that starts brokers and instances on the host. `visible`: as `CannHost.environment`."""
    double = host.environment(visible=visible)
    return {
        "WEIGHT_BROKER_CARDS_PRELOAD": double.pop("LD_PRELOAD"),
        "WEIGHT_BROKER_CARDS_LIBRARY_PATH": double.pop("LD_LIBRARY_PATH"),
        **double,
    }


def main() -> int:
    """The command's exit status."""
    parser = argparse.ArgumentParser(prog="doubles.cann.run")
    parser.add_argument("--cards", type=int, default=4)
    parser.add_argument("--visible", metavar="LIST", help="ASCEND_RT_VISIBLE_DEVICES (1 to --cards)")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    try:
        build()
    except CannotBuild as error:
        sys.exit(str(error))
    with CannHost(cards=options.cards) as host:
        child = subprocess.Popen(options.command, env=os.environ | variables(host, visible=options.visible))
        # The command ends in order and this process after it, whoever is told to end.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        status = child.wait()
        for line in host.violations():
            print(f"violation: {line}", file=sys.stderr)
        return status or (1 if host.violations() else 0)


if __name__ == "__main__":
    sys.exit(main())
