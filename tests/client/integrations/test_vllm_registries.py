"""A model that is made twice leaves nothing of the first one in the registries of vLLM and vllm-ascend."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from weight_broker.integrations.vllm.registries import Registries


def test_what_the_first_model_registered_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    adaptor = SimpleNamespace(_registered_moe_layers=["of another model"])
    module: Any = ModuleType("vllm_ascend.eplb.adaptor.vllm_adaptor")
    module.VllmEplbAdaptor = adaptor
    monkeypatch.setitem(sys.modules, module.__name__, module)
    config = SimpleNamespace(static_forward_context={"draft.layer": 1}, static_all_moe_layers=["draft.layer"])
    before = Registries(config)
    config.static_forward_context["layer"] = 2
    config.static_all_moe_layers.append("layer")
    adaptor._registered_moe_layers.append("layer")
    before.restore()
    assert config.static_forward_context == {"draft.layer": 1}
    assert config.static_all_moe_layers == ["draft.layer"]
    assert adaptor._registered_moe_layers == ["of another model"]


def test_versions_without_these_registries_have_nothing_to_restore() -> None:
    Registries(SimpleNamespace()).restore()
