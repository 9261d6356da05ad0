"""What the random events of `support.core_machine` are about."""

from __future__ import annotations

from hypothesis import strategies as st

from weight_broker.key import WeightSetKey
from weight_broker.layout import Layout, TensorSpec
from weight_brokerd.core.model import DataPlane

KEYS = [WeightSetKey("model-a"), WeightSetKey("model-b")]
LAYOUTS = [
    Layout([TensorSpec("weight", "bfloat16", (4,), (1,), 8)]),
    Layout([TensorSpec("weight", "bfloat16", (8,), (1,), 16)]),
]
DEVICES = [("cpu", ""), ("npu", "npu:0"), ("npu", "npu:1")]
"""Kinds of memory and cards: host memory is copied by its receiver, device memory by the broker."""
OTHER_KINDS = [frozenset[str](), frozenset({"cpu"})]
"""Memory besides its own from which a receiver fills itself."""
LEASE_SECONDS = 60.0
WAIT_SECONDS = 300.0
DATA_PLANES = st.sampled_from([plane for plane in DataPlane if plane.is_known])
