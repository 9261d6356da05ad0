"""vLLM loads its weights through the broker: `vllm serve MODEL --load-format weight_broker`.

The entry point `vllm.general_plugins` calls `register`; nothing of vLLM is patched. Upstream vLLM and vllm-ascend from
0.10.0 on. docs/VLLM.md says what is published when, and why something is not.
"""

from __future__ import annotations

from weight_broker.integrations.engine.published import reports, republish, retract
from weight_broker.integrations.vllm.plugin import LOAD_FORMAT, register

__all__ = ["LOAD_FORMAT", "register", "reports", "republish", "retract"]
