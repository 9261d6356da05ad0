"""`weight-broker doctor --prove`: whether the drivers of this machine's devices keep what their sources say."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys

from weight_broker.cli.failure import CommandError, ExitCode

_EXIT_CODES = {0: ExitCode.DONE, 2: ExitCode.USAGE}


def run(options: argparse.Namespace) -> ExitCode:
    """Runs the proof, which prints its rows; FAILED if a row is unlike its source, USAGE if nothing was run."""
    if importlib.util.find_spec("weight_brokerd") is None:
        raise CommandError("the proof is a part of the broker: pip install 'weight-broker[broker]'", ExitCode.USAGE)
    done = subprocess.run([sys.executable, "-m", "weight_brokerd.proof", *_arguments(options)], check=False)
    return _EXIT_CODES.get(done.returncode, ExitCode.FAILED)


def _arguments(options: argparse.Namespace) -> list[str]:
    chosen = [f"--json={options.prove}"]
    if options.beside_others:
        chosen.append("--beside-others")
    if options.as_unit is not None:
        chosen += ["--as-unit", *options.as_unit]
    return chosen
