"""Fixtures for real SGLang loaders. Without SGLang nothing here is collected: `make test-sglang` has it."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from support.sglang_process import RankProcess
from support.vllm_models import write_qwen2, write_qwen2_moe

if find_spec("sglang") is None:
    collect_ignore_glob = ["test_*.py"]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def start_engine(tmp_path: Path) -> Iterator[Callable[..., list[RankProcess]]]:
    """Starts engines, as lists of their ranks; ends them after the test."""
    with ExitStack() as stack:

        def start(
            model: Path,
            *arguments: str,
            ranks: int = 1,
            extra: dict[str, Any] | None = None,
            before: str = "",
            load_format: str = "weight_broker",
        ) -> list[RankProcess]:
            given = ["--model-path", str(model), "--load-format", load_format, "--tp-size", str(ranks), *arguments]
            if extra is not None:
                given += ["--model-loader-extra-config", json.dumps(extra)]
            port, started = _free_port(), []
            for rank in range(ranks):
                options = {"arguments": given, "rank": rank, "port": port, "before": before}
                one = RankProcess(tmp_path / "run", options)
                stack.callback(one.close)
                started.append(one.start())
            return started

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
