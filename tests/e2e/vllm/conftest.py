"""Fixtures for real vLLM: engines, checkpoints. Without vLLM nothing here is collected: `make test-vllm` has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from support.vllm_models import write_qwen2, write_qwen2_moe
from support.vllm_process import EngineProcess

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def start_engine(tmp_path: Path) -> Iterator[Callable[..., EngineProcess]]:
    """Starts engines; ends them after the test."""
    with ExitStack() as stack:

        def start(
            model: Path,
            *,
            through_broker: bool = True,
            multiprocessing: bool = False,
            environment: dict[str, str] | None = None,
            in_every_process: str = "",
            port: int = 0,
            **options: Any,
        ) -> EngineProcess:
            if through_broker:
                options = {"load_format": "weight_broker", **options}
            engine = EngineProcess(
                tmp_path / "run",
                {"model": str(model), **options},
                multiprocessing,
                environment or {},
                in_every_process,
                port,
            )
            stack.callback(engine.close)
            return engine.start()

        yield start


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small checkpoints by name."""
    directory = tmp_path_factory.mktemp("models")
    return {
        "untied": write_qwen2(directory / "untied"),
        "tied": write_qwen2(directory / "tied", tied=True),
        "moe": write_qwen2_moe(directory / "moe"),
    }
