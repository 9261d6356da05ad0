"""What is published is retracted before it changes, and published again only if it has not changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.broker_process import BrokerProcess
from support.vllm_process import EngineProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

Start = Callable[..., EngineProcess]


def offered(result: dict[str, Any], call: int) -> tuple[bool, str]:
    """Whether the weights were offered after a call, and why not."""
    ((report,),) = result["calls"][call]
    return bool(report["publication_id"]), report["not_published"]


def test_a_sleep_retracts_and_waking_up_publishes_again(
    broker: BrokerProcess, start_engine: Start, models: dict[str, Path]
) -> None:
    calls = [
        "sleep [1]",
        "reports",
        "wake_up",
        "reports",
        "reload_weights",
        "reports",
        "generate",
        "wake_up",
        "reports",
    ]
    result = start_engine(models["untied"], hold=True, calls=calls).result()
    assert offered(result, 1) == (False, "retracted: the engine goes to sleep")
    assert offered(result, 3) == (True, "")
    assert offered(result, 5) == (False, "retracted: reload_weights changes the weights")
    assert result["calls"][6] == result["digest"]
    assert offered(result, 8)[0] is False, "nobody knows what the weights are after a change"
    assert broker.publications() == []


def test_weights_that_changed_in_a_sleep_are_not_published_again(
    broker: BrokerProcess, start_engine: Start, models: dict[str, Path]
) -> None:
    calls = ["sleep [1]", "scribble", "wake_up", "reports"]
    result = start_engine(models["untied"], hold=True, calls=calls).result()
    assert offered(result, 3) == (False, "the sleep changed the weights")
    assert broker.publications() == []


def test_weights_that_are_loaded_into_the_model_are_retracted_first(
    broker: BrokerProcess, start_engine: Start, models: dict[str, Path]
) -> None:
    """As trainers do that reach into the worker."""
    result = start_engine(models["untied"], hold=True, calls=["load_weights", "reports"]).result()
    assert offered(result, 1) == (False, "retracted: weights are loaded into the model")
    assert broker.publications() == []
