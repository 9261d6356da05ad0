"""Which files are a checkpoint: those that transformers reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from weight_broker.integrations.checkpoint import CheckpointError, checkpoint_files

CONFIGURATION = Qwen2Config(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
)


def model(seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(CONFIGURATION)


def weights(seed: int) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model(seed).state_dict().items()}


def index(directory: Path, name: str, files: dict[str, str]) -> None:
    (directory / name).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def write(directory: Path, name: str, seed: int) -> None:
    """A way to keep weights in a directory."""
    found = weights(seed)
    if name.endswith(".index.json"):
        file = f"shard{seed}." + ("safetensors" if "safetensors" in name else "bin")
        index(directory, name, dict.fromkeys(found, file))
        name = file
    if name.endswith(".bin"):
        torch.save(found, directory / name)
    else:
        save_file(found, directory / name, metadata={"format": "pt"})


NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@pytest.mark.parametrize("first", range(len(NAMES)))
def test_the_files_are_those_that_transformers_reads(tmp_path: Path, first: int) -> None:
    CONFIGURATION.save_pretrained(tmp_path)
    for seed, name in enumerate(NAMES):
        if seed >= first:
            write(tmp_path, name, seed)
    write(tmp_path, "adapter.safetensors", 7)
    read = Qwen2ForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in weights(first).items())
    [file] = checkpoint_files(tmp_path)
    assert file.name == ("shard" + str(first) + file.suffix if "index" in NAMES[first] else NAMES[first])


def test_a_file_that_the_configuration_names_goes_first(tmp_path: Path) -> None:
    CONFIGURATION.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "transformers_weights": "tuned.safetensors"}))
    write(tmp_path, "model.safetensors", 0)
    write(tmp_path, "tuned.safetensors", 1)
    read = Qwen2ForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in weights(1).items())
    assert [file.name for file in checkpoint_files(tmp_path)] == ["tuned.safetensors"]


def test_variants_and_other_formats_are_not_read(tmp_path: Path) -> None:
    write(tmp_path, "model.fp16.safetensors", 0)
    write(tmp_path, "pytorch_model.bin", 1)
    (tmp_path / "consolidated.00.pth").write_bytes(b"")
    (tmp_path / "model.pt").write_bytes(b"")
    assert [file.name for file in checkpoint_files(tmp_path)] == ["pytorch_model.bin"]


def test_a_configuration_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"transformers_weights": "../tuned.safetensors"}')
    with pytest.raises(CheckpointError, match="not a file of the same directory"):
        checkpoint_files(tmp_path)
