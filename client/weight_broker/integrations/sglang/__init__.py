"""SGLang loads its weights through the broker: `sglang serve --model-path MODEL --load-format weight_broker`.

The entry point `sglang.srt.plugins` calls `register`; nothing of SGLang is patched. SGLang has such plugins from 0.5.11
on. docs/SGLANG.md says what is shared, and what of this has been run.
"""

from __future__ import annotations

from weight_broker.integrations.engine.published import reports, republish, retract
from weight_broker.integrations.sglang.plugin import LOAD_FORMAT, register

__all__ = ["LOAD_FORMAT", "register", "reports", "republish", "retract"]
