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


def test_a_sleep_leaves_a_copy_published_and_a_change_retracts_it(
    broker: BrokerProcess, start_engine: Start, models: dict[str, Path]
) -> None:
    """What is published in host memory is a copy of the loaded weights. test_engine_on_gpu.py has memory that is
    published in place."""
    calls = ["sleep [1]", "scribble", "wake_up", "reports", "reload_weights", "reports", "generate"]
    result = start_engine(models["untied"], hold=True, calls=calls).result()
    assert offered(result, 3) == (True, "")
    assert offered(result, 5) == (False, "retracted: reload_weights changes the weights")
    assert result["calls"][6] == result["digest"]
    assert broker.publications() == []


def test_a_peer_is_filled_from_an_engine_whose_own_weights_a_sleep_has_changed(
    broker: BrokerProcess, start_engine: Start, models: dict[str, Path]
) -> None:
    first = start_engine(models["untied"], hold=True, calls=["sleep [1]", "scribble"]).result()
    second = start_engine(models["untied"]).result()
    assert [report["source"] for (report,) in second["reports"]] == ["peer"]
    assert second["digest"] == first["digest"]


def test_weights_that_are_loaded_into_the_model_are_retracted_first(
    broker: BrokerProcess, start_engine: Start, models: dict[str, Path]
) -> None:
    """As trainers do that reach into the worker."""
    result = start_engine(models["untied"], hold=True, calls=["load_weights", "reports"]).result()
    assert offered(result, 1) == (False, "retracted: weights are loaded into the model")
    assert broker.publications() == []
