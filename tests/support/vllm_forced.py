"""What engines do for tests, and never should: the order that the loader does not allow (weights are taken as
post-processing left them, and put where post-processing has been already), and transfers that break off half way."""

from __future__ import annotations

import dataclasses
from typing import Any

from weight_broker.client import BrokerClient
from weight_broker.key import Stage, WeightSetKey

KEY = WeightSetKey("forced", stage=Stage.RUNTIME)
clients: list[BrokerClient] = []
"""They live as long as the process."""


def install(role: str) -> None:
    """Makes the load format do so: as the one that publishes, or the one that acquires."""
    from vllm.model_executor.model_loader import get_model_loader

    from weight_broker.integrations.engine.tensors import weight_tensors
    from weight_broker.integrations.vllm.loader import BrokerModelLoader

    def load_model(self: Any, vllm_config: Any, model_config: Any, **options: Any) -> Any:
        load_format = "auto" if role == "publish" else "dummy"
        loader = get_model_loader(dataclasses.replace(self.load_config, load_format=load_format))
        model = loader.load_model(vllm_config, model_config, **options)
        client = BrokerClient(name=role)
        clients.append(client)
        if role == "publish":
            client.publish(KEY, weight_tensors(model))
        else:
            client.acquire(KEY, weight_tensors(model))
        return model

    loader_class: Any = BrokerModelLoader
    loader_class.load_model = load_model


def break_transfers() -> None:
    """From now on a transfer fails after it has written nonsense into every tensor."""
    import torch

    from weight_broker.errors import TransferFailed
    from weight_broker.memory.host.destination import TensorFiller

    def receive(self: Any, source: Any, deadline: float) -> Any:
        for one in self._described.tensors:
            with torch.no_grad():
                one.owner.fill_(1)
        raise TransferFailed("broken off by a test", touched=True)

    filler: Any = TensorFiller
    filler.receive = receive


def hold_transfers(directory: str) -> None:
    """From now on a transfer says that it has begun (the file `moving`), and goes on once there is a file `go`."""
    import time
    from pathlib import Path

    from weight_broker.memory.host.destination import TensorFiller

    moving, go = Path(directory, "moving"), Path(directory, "go")
    filler: Any = TensorFiller
    receive = filler.receive

    def held(self: Any, source: Any, deadline: float) -> Any:
        moving.touch()
        while not go.exists():
            time.sleep(0.05)
        return receive(self, source, deadline)

    filler.receive = held
