"""A process that loads models imports what an acquire needs before its first one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from support import actions
from support.broker_process import BrokerProcess
from support.instance_process import InstanceProcess

PROGRAM = """
import importlib, sys
import torch
importlib.import_module(sys.argv[2])
from weight_broker import BrokerClient, WeightSetKey
before = set(sys.modules)
client = BrokerClient(sys.argv[1])
key = WeightSetKey("model")
attached = client.attach_tensors(key)
tensors = {name: torch.zeros_like(tensor) for name, tensor in attached.items()}
client.acquire(key, tensors)
client.publish(WeightSetKey("other"), tensors)
client.close()
# gRPC imports its own parts when a channel is opened.
print(sorted(name for name in set(sys.modules) - before if not name.startswith("grpc.")))
"""


@pytest.mark.parametrize("integration", ["weight_broker.integrations.torch", "weight_broker.integrations.engine.load"])
def test_the_first_acquire_of_a_loader_imports_nothing(
    broker: BrokerProcess, start_instance: Callable[..., InstanceProcess], integration: str
) -> None:
    start_instance("first").call(actions.publish, "model", 1)
    command = [sys.executable, "-c", PROGRAM, str(broker.runtime_directory), integration]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
