"""Every supported version of vLLM offers what the plugin relies on, as recorded from its wheel's source."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from support.vllm_contract import RECORDS, read
from weight_broker.integrations.vllm.key import LOADED_LAYOUT_VERSIONS

CONTRACTS: dict[str, dict[str, Any]] = json.loads(RECORDS.read_text())


def minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def test_the_first_and_the_last_version_that_share_weights_are_recorded() -> None:
    assert (min(map(minor, CONTRACTS)), max(map(minor, CONTRACTS))) == LOADED_LAYOUT_VERSIONS


@pytest.mark.parametrize("version", CONTRACTS)
def test_what_the_plugin_relies_on_is_there(version: str) -> None:
    contract = CONTRACTS[version]
    assert contract["get_model_loader"]
    assert contract["registry"] or contract["load_formats_are_an_enumeration"]
    assert contract["abstract"] == ["download_model", "load_weights"], "what a loader has to define"
    assert contract["load_model_arguments"][:3] == ["self", "vllm_config", "model_config"]
    assert set(contract["load_model_arguments"][3:]) <= {"prefix"}
    assert contract["load_model_calls"] == ["self.load_weights", "process_weights_after_loading"], "in this order, once"
    assert contract["loads_with"] == "self.load_weights(model, model_config)"
    assert contract["instance_id"]
    assert set(contract["groups"]) >= {"get_tp_group", "get_pp_group", "get_dp_group", "get_ep_group", "get_node_count"}
    assert {"sleep", "wake_up"} <= set(contract["worker_methods"])
    assert contract["eplb_rearranges"]


@pytest.mark.parametrize("version", CONTRACTS)
def test_the_record_is_what_the_wheel_says(version: str) -> None:
    """Where the wheels are: `VLLM_WHEELS` is a directory of them."""
    directory = os.environ.get("VLLM_WHEELS")
    wheels = sorted(Path(directory).glob(f"vllm-{version}-*.whl")) if directory else []
    if not wheels:
        pytest.skip("VLLM_WHEELS has no wheel of this version")
    assert read(wheels[0]) == CONTRACTS[version]
