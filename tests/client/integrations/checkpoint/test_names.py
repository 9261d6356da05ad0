"""Whether the files that a key covers can be a model's."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.checkpoints import write_file
from weight_broker.integrations.checkpoint import CoveredWeights, unlike_model

MODEL = {"model.layers.0.self_attn.q_proj.weight": 60, "model.norm.weight": 10}


def written(path: Path, tensors: dict[str, int]) -> Path:
    write_file(path, {name: bytes(size) for name, size in tensors.items()})
    return path


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (MODEL, ""),
        ({**MODEL, "rotary.inv_freq": 5}, ""),
        ({"language_model.layers.0.self_attn.q_proj.weight": 60, "final": 10}, ""),
        ({"v_head.summary.weight": 5}, "have 5 numbers, and the model 70"),
        ({"model.norm.weight": 10}, "model.layers.0.self_attn.q_proj.weight"),
        ({"encoder.conv.kernel": 100}, "other tensors than the model, for example encoder.conv.kernel"),
    ],
    ids=["the same", "more", "renamed", "too little", "one lacks", "another model"],
)
def test_files_with_too_little_or_with_other_tensors_are_another_model(
    tmp_path: Path, tensors: dict[str, int], reason: str
) -> None:
    found = unlike_model([written(tmp_path / "model.safetensors", tensors)], MODEL)
    assert reason in found
    assert bool(found) is bool(reason)


def test_files_of_torch_are_not_compared(tmp_path: Path) -> None:
    assert unlike_model([tmp_path / "pytorch_model.bin"], MODEL) == ""


def test_tensors_that_were_read_from_files_of_the_key_are_covered(tmp_path: Path) -> None:
    covered = CoveredWeights([written(tmp_path / "model.safetensors", MODEL)])
    assert list(covered.noted([("model.norm.weight", 7)])) == [("model.norm.weight", 7)]
    assert covered.refusal() == ""  # a rank need not read everything
    list(covered.noted([(f"v_head.{index}", index) for index in range(10)]))
    assert covered.refusal().endswith("v_head.6, v_head.7 and 2 more")


def test_files_that_cannot_be_read_again_are_a_refusal(tmp_path: Path) -> None:
    covered = CoveredWeights([tmp_path / "absent.safetensors"])
    assert "absent.safetensors" in covered.refusal()


def test_a_loader_that_is_not_watched_is_not_refused(tmp_path: Path) -> None:
    assert CoveredWeights([written(tmp_path / "model.safetensors", MODEL)]).refusal() == ""
    unknown = CoveredWeights()
    list(unknown.noted([("a", 1)]))
    assert unknown.refusal() == ""
