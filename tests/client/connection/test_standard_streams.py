"""In a process that has closed descriptors 0 to 2 nothing of the client gets their numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.broker_process import BrokerProcess

PROGRAM = """
import os, sys
import numpy as np
from weight_broker import BrokerClient, WeightSetKey

for descriptor in range(3):
    os.close(descriptor)
with BrokerClient(sys.argv[1]) as client:
    client.publish(WeightSetKey("model"), {"w": np.ones(1000, np.float32)})
    taken = [os.readlink(f"/proc/self/fd/{descriptor}") for descriptor in range(3)]
    inheritable = [os.get_inheritable(descriptor) for descriptor in range(3)]
with open(sys.argv[2], "w") as file:
    print(*taken, *inheritable, file=file)
"""


def test_they_lead_nowhere_and_no_program_inherits_them(broker: BrokerProcess, tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    program = [sys.executable, "-c", PROGRAM, str(broker.runtime_directory), str(answer)]
    subprocess.run(program, check=True, timeout=60)
    assert answer.read_text().split() == [os.devnull] * 3 + ["False"] * 3
