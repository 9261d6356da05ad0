"""A language model is the one of `from_pretrained`, also where its configuration says little or the caller has set
defaults."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2ForCausalLM

from support.broker_process import BrokerProcess
from support.models import logits, write_model
from weight_broker import BrokerClient, WeightSetKey
from weight_broker.integrations.torch import attach_module, load_module, materialise_empty, tensors_of
from weight_broker.integrations.transformers import load_causal_lm

NewClient = Callable[[], BrokerClient]
KEY = WeightSetKey("layer", dtype="float32")


@pytest.fixture
def new_client(broker: BrokerProcess) -> Iterator[NewClient]:
    """Makes clients; to the broker each is another instance."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(BrokerClient(broker.runtime_directory))


def from_pretrained(directory: Path) -> PreTrainedModel:
    auto: Any = AutoModelForCausalLM
    model: PreTrainedModel = auto.from_pretrained(directory)
    return model


def rewrite(directory: Path, dtype_of: Callable[[str], torch.dtype], *, stated: str | None = None) -> None:
    """A configuration without a type, and tensors of several types, in two files with an index or in one."""
    config = json.loads((directory / "config.json").read_text())
    del config["dtype"]
    (directory / "config.json").write_text(json.dumps(config))
    whole = directory / "model.safetensors"
    tensors = {name: tensor.to(dtype_of(name)) for name, tensor in load_file(whole).items()}
    if stated is None:
        save_file(tensors, whole, {"format": "pt"})
        return
    whole.unlink()
    places: dict[str, str] = {}
    for number in range(2):
        names = sorted(tensors)[number::2]
        save_file({name: tensors[name] for name in names}, directory / f"model-{number}.safetensors", {"format": "pt"})
        places |= dict.fromkeys(names, f"model-{number}.safetensors")
    index = {"metadata": {"dtype": stated} if stated else {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def norm_is_wide(name: str) -> torch.dtype:
    return torch.float32 if "norm" in name else torch.bfloat16


def embedding_is_wide(name: str) -> torch.dtype:
    return torch.float32 if "embed" in name else torch.float16


@pytest.mark.parametrize("dtype_of", [norm_is_wide, embedding_is_wide])
@pytest.mark.parametrize("stated", [None, "", "float16", "bfloat16"])
def test_the_type_is_the_one_that_from_pretrained_takes(
    tmp_path: Path, new_client: NewClient, dtype_of: Callable[[str], torch.dtype], stated: str | None
) -> None:
    directory = write_model(tmp_path / "model", tied=False)
    rewrite(directory, dtype_of, stated=stated)
    expected = from_pretrained(directory)
    for _ in range(2):
        model, report = load_causal_lm(directory, new_client())
        assert (report.acquire_error, report.publish_error) == (None, None)
        assert model.dtype == expected.dtype
        assert logits(model) == logits(expected)


def test_the_type_is_read_with_the_weights_where_no_safetensors_file_says_it(
    tmp_path: Path, new_client: NewClient
) -> None:
    directory = write_model(tmp_path / "model")
    rewrite(directory, lambda name: torch.float16)
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    model, report = load_causal_lm(directory, new_client(), key=KEY)
    assert (model.dtype, report.source) == (torch.float16, "disk")
    assert "type" in (report.acquire_error or "")


@pytest.mark.parametrize("zero_copy", [True, False])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_language_model_is_in_host_memory_whatever_the_default_device_is(
    tmp_path: Path, new_client: NewClient, device: str, zero_copy: bool
) -> None:
    directory = write_model(tmp_path / "model")
    expected = logits(from_pretrained(directory))
    sources = []
    for _ in range(2):
        with torch.device(device), torch.inference_mode():
            model, report = load_causal_lm(directory, new_client(), zero_copy=zero_copy)
        sources.append(report.source)
        assert logits(model) == expected
    assert sources == ["disk", "peer"]
    torch.set_default_device(device)
    try:
        model, report = load_causal_lm(directory, new_client(), zero_copy=zero_copy)
        without, _ = load_causal_lm(directory, None)
    finally:
        torch.set_default_device(None)
    assert (report.source, logits(model), logits(without)) == ("peer", expected, expected)


@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), torch.inference_mode, torch.no_grad])
def test_plain_modules_are_filled_in_any_mode_of_torch(mode: Callable[[], Any], new_client: NewClient) -> None:
    source, copied, filled = (nn.LSTM(4, 4) for _ in range(3))
    with mode():
        new_client().publish(KEY, tensors_of(source))
        assert load_module(copied, KEY, lambda: pytest.fail("the disk was read"), new_client()).source == "peer"
        new_client().acquire(KEY, tensors_of(filled))
    with torch.device("meta"):
        attached, empty = nn.LSTM(4, 4), nn.LSTM(4, 4)
    with mode():
        attach_module(attached, KEY, new_client())
        materialise_empty(empty)
        new_client().acquire(KEY, tensors_of(empty))
    x = torch.ones(3, 4)
    for module in (copied, filled, attached, empty):
        assert torch.equal(module(x)[0], source(x)[0])
        assert all(parameter.requires_grad for parameter in module.parameters())
        with torch.no_grad():
            next(module.parameters()).add_(1)  # not a tensor of inference mode


def test_numbers_that_from_pretrained_computes_are_not_left_out(
    tmp_path: Path, new_client: NewClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_model(tmp_path / "model")
    original = Qwen2ForCausalLM.from_pretrained.__func__  # type: ignore[attr-defined]

    def calibrated(kind: Any, *arguments: Any, **options: Any) -> Any:
        found = original(kind, *arguments, **options)
        model = found[0] if isinstance(found, tuple) else found
        model.largest = float(model.lm_head.weight.detach().float().max())
        return found

    monkeypatch.setattr(Qwen2ForCausalLM, "from_pretrained", classmethod(calibrated))
    for _ in range(2):
        model, report = load_causal_lm(directory, new_client())
        whole: Any = model
        assert whole.largest == float(whole.lm_head.weight.detach().float().max())
        assert (report.source, "largest: absent -> " in (report.acquire_error or "")) == ("disk", True)
