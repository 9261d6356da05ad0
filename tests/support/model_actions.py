"""What instances do with language models when a test tells them to."""

from __future__ import annotations

from support.actions import State
from support.models import logits
from weight_broker.integrations.transformers import load_causal_lm


def load_model(state: State, /, model_dir: str, zero_copy: bool) -> tuple[str, str, str]:
    """Loads a model and keeps it; returns its source, the way and the digest of its logits."""
    model, report = load_causal_lm(model_dir, state.client, zero_copy=zero_copy)
    state.attached = {"model": model}
    acquired = report.report
    return report.source, acquired.path if acquired is not None else "read", logits(model)
