"""`weight-broker doctor --prove`: whether the drivers of this machine's devices keep what their sources say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from weight_broker.cli.failure import ExitCode


def run(file: Path, *, beside: bool) -> ExitCode:
    """Runs the proof, which prints its rows; FAILED if a row is unlike its source. `beside`: although other processes
    use the devices."""
    command = [sys.executable, "-m", "weight_brokerd.proof", f"--json={file}", *(["--beside"] if beside else [])]
    done = subprocess.run(command, check=False)
    return ExitCode.FAILED if done.returncode else ExitCode.DONE
