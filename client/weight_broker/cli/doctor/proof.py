"""`weight-broker doctor --prove`: whether the drivers of this machine's devices keep what their sources say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from weight_broker.cli.failure import ExitCode


def run(file: Path) -> ExitCode:
    """Runs the proof, which prints its rows; FAILED if a row is unlike its source."""
    done = subprocess.run([sys.executable, "-m", "weight_brokerd.proof", f"--json={file}"], check=False)
    return ExitCode.FAILED if done.returncode else ExitCode.DONE
