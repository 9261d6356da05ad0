"""Checkpoints with random weights for real vLLM. Every tensor matters: what transformers initialises with zeros or
ones is made random too, so that a tensor that is not loaded shows in the tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
    # 1.7 GB in bfloat16
    "big": {"vocab_size": 32000, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 16,
            "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 2048},
}  # fmt: skip


def write_qwen2(directory: Path, *, tied: bool = False, seed: int = 0, shape: str = "tiny") -> Path:
    """A dense Qwen2."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(tie_word_embeddings=tied, architectures=["Qwen2ForCausalLM"], **SHAPES[shape])
    return _write(directory, Qwen2ForCausalLM, config, seed)


def write_qwen2_moe(directory: Path, *, seed: int = 0) -> Path:
    """A Qwen2 with experts and a shared expert in every layer."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        tie_word_embeddings=False,
        architectures=["Qwen2MoeForCausalLM"],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=128,
        **SHAPES["tiny"],
    )
    return _write(directory, Qwen2MoeForCausalLM, config, seed)


def _write(directory: Path, model_class: Any, config: Any, seed: int) -> Path:
    import torch

    torch.manual_seed(seed)
    config.dtype = torch.bfloat16
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = model_class(config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(directory)
    return directory
