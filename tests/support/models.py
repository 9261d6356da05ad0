"""Small language models as checkpoints on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

_logging: Any = logging


def write_model(directory: Path, *, tied: bool = True, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """A Qwen2 checkpoint of about a megabyte in which every tensor, biases too, is random."""
    _logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=1000,
            hidden_size=96,
            intermediate_size=200,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=tied,
            dtype=str(dtype).removeprefix("torch."),
        )
    )
    nn.Module.to(model, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.2, 0.2)
    model.save_pretrained(directory)
    return directory


def logits(model: PreTrainedModel, tokens: int = 7) -> str:
    """Digest of the logits' bytes for a fixed prompt, and for its first token alone: another kernel may do that."""
    digest = hashlib.sha256()
    prompt = torch.arange(3, 3 + tokens)[None]
    for given in (prompt, prompt[:, :1]):
        with torch.inference_mode():
            digest.update(model(given).logits.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
