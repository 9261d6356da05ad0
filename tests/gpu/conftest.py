"""Fixtures: a real GPU with torch on it, a real broker, processes. Everything here is skipped without a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from support.broker_process import BrokerProcess
from support.card_process import CalledProcess


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        why = "this build of torch has no CUDA" if torch.version.cuda is None else "torch finds no GPU"
        pytest.skip(f"needs an NVIDIA GPU: {why}")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerProcess]:
    """A broker that serves the GPUs of this machine."""
    process = BrokerProcess(tmp_path / "run", WEIGHT_BROKER_CUDA_ENABLED="on")
    try:
        yield process.start()
    finally:
        process.close()


@pytest.fixture
def start_instance(tmp_path: Path) -> Iterator[Callable[..., CalledProcess]]:
    """Starts processes that call functions of `support.torch_gpu_instance`."""
    with ExitStack() as stack:

        def start(name: str, **environment: str) -> CalledProcess:
            directory = str(tmp_path / "run")
            process = CalledProcess(
                {
                    **os.environ,
                    "WEIGHT_BROKER_RUNTIME_DIRECTORY": directory,
                    "INSTANCE_NAME": name,
                    **environment,
                }
            )
            stack.callback(process.close)
            return process

        yield start
