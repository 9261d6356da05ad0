"""Language models are loaded through the broker: once from disk, then from whoever has them, with the same logits."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from support import model_actions
from support.broker_process import BrokerProcess
from support.instance_process import InstanceProcess
from support.models import logits, write_model
from support.waiting import eventually
from weight_broker import BrokerClient, LoadReport, WeightSetKey
from weight_broker.integrations.torch import tensors_of
from weight_broker.integrations.transformers import load_causal_lm, weight_set_key

ALIGNMENT = 64
NewClient = Callable[..., BrokerClient]


@pytest.fixture
def new_client(broker: BrokerProcess) -> Iterator[NewClient]:
    """Makes clients, each an instance of its own to the broker."""
    with ExitStack() as stack:
        yield lambda name="": stack.enter_context(BrokerClient(broker.runtime_directory, name=name))


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A checkpoint with tied weights."""
    return write_model(tmp_path / "model")


def from_pretrained(directory: Path, **options: Any) -> PreTrainedModel:
    """The model as transformers loads it, with its weights moved out of the file's mapping: there they may lie at
    addresses for which some kernels give other last bits."""
    auto: Any = AutoModelForCausalLM
    model: PreTrainedModel = auto.from_pretrained(directory, **options)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def is_tied(model: PreTrainedModel) -> bool:
    whole: Any = model
    return whole.get_output_embeddings().weight is whole.get_input_embeddings().weight


def path_of(report: LoadReport) -> str:
    return report.report.path if report.report is not None else "read"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_way_gives_the_model_that_from_pretrained_gives(
    tmp_path: Path, new_client: NewClient, tied: bool, dtype: torch.dtype
) -> None:
    directory = write_model(tmp_path / "model", tied=tied, dtype=dtype)
    expected = from_pretrained(directory)
    wanted = tensors_of(expected)
    found = []
    for zero_copy in ("auto", True, False):
        model, report = load_causal_lm(directory, new_client(), zero_copy=zero_copy)
        assert (report.acquire_error, report.publish_error) == (None, None)
        found.append((report.source, path_of(report)))
        tensors = tensors_of(model)
        assert tensors.keys() == wanted.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, wanted[name]), name
            assert tensor.dtype == wanted[name].dtype, name
            assert tensor.data_ptr() % ALIGNMENT == 0, name
            assert not tensor.requires_grad, name
        assert is_tied(model) is tied
        assert not any(module.training for module in model.modules())
        assert model.state_dict().keys() == expected.state_dict().keys()
        assert model.config.to_dict() == expected.config.to_dict()
        assert model.generation_config.to_dict() == expected.generation_config.to_dict()
        assert logits(model) == logits(expected)
    assert found == [("disk", "read"), ("peer", "zero_copy"), ("peer", "copy")]


def test_processes_load_from_one_another(
    broker: BrokerProcess, start_instance: Callable[..., InstanceProcess], model_dir: Path
) -> None:
    first, second, third = (start_instance(name) for name in ("first", "second", "third"))
    expected = logits(from_pretrained(model_dir))
    first.begin(model_actions.load_model, str(model_dir), True)
    assert first.result() == ("disk", "read", expected)
    second.begin(model_actions.load_model, str(model_dir), True)
    assert second.result() == ("peer", "zero_copy", expected)
    # The weights outlive the instance that loaded them: whoever has them is a source.
    first.kill()
    eventually(lambda: broker.host().publication_count == 1)
    third.begin(model_actions.load_model, str(model_dir), False)
    assert third.result() == ("peer", "copy", expected)


def test_receivers_do_not_read_the_weights_from_disk(model_dir: Path, new_client: NewClient) -> None:
    key = weight_set_key(model_dir)
    first, _ = load_causal_lm(model_dir, new_client(), key=key)
    (model_dir / "model.safetensors").unlink()
    for zero_copy in (True, False):
        model, report = load_causal_lm(model_dir, new_client(), key=key, zero_copy=zero_copy)
        assert report.source == "peer"
        assert logits(model) == logits(first)


@pytest.mark.parametrize("zero_copy", [True, False])
def test_what_one_instance_writes_to_its_weights_stays_its_own(
    model_dir: Path, new_client: NewClient, zero_copy: bool
) -> None:
    load_causal_lm(model_dir, new_client())
    spoilt, _ = load_causal_lm(model_dir, new_client(), zero_copy=zero_copy)
    expected = logits(spoilt)
    with torch.no_grad():
        tensors_of(spoilt)["model.embed_tokens.weight"].fill_(1.0)
    assert logits(spoilt) != expected
    for other in (True, False):
        model, report = load_causal_lm(model_dir, new_client(), zero_copy=other)
        assert report.source == "peer"
        assert logits(model) == expected


def test_filling_from_a_peer_initialises_nothing(
    model_dir: Path, new_client: NewClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = load_causal_lm(model_dir, new_client())
    for name in ("normal_", "uniform_", "zeros_", "ones_", "kaiming_uniform_"):
        original = getattr(torch.nn.init, name)

        def refuse_real(tensor: torch.Tensor, *args: Any, original: Any = original, **kwargs: Any) -> torch.Tensor:
            assert tensor.is_meta
            result: torch.Tensor = original(tensor, *args, **kwargs)
            return result

        monkeypatch.setattr(torch.nn.init, name, refuse_real)
    monkeypatch.setattr(PreTrainedModel, "_init_weights", lambda *_: pytest.fail("weights were initialised"))
    for zero_copy in (True, False):
        model, report = load_causal_lm(model_dir, new_client(), zero_copy=zero_copy)
        assert (report.source, logits(model)) == ("peer", logits(first))


def test_without_a_broker_the_model_comes_from_disk_as_it_is(tmp_path: Path, model_dir: Path) -> None:
    for client in (BrokerClient(tmp_path / "nothing"), None):
        for zero_copy in ("auto", True, False):
            model, report = load_causal_lm(model_dir, client, zero_copy=zero_copy)
            assert report.source == "disk"
            assert ("no broker" in (report.acquire_error or "")) is (client is not None)
            assert logits(model) == logits(from_pretrained(model_dir))


def test_a_fine_tune_of_the_same_shape_in_the_same_place_is_another_weight_set(
    model_dir: Path, new_client: NewClient
) -> None:
    base, _ = load_causal_lm(model_dir, new_client())
    shutil.rmtree(model_dir)
    write_model(model_dir, seed=1)
    tuned, report = load_causal_lm(model_dir, new_client())
    assert report.source == "disk"
    assert logits(tuned) == logits(from_pretrained(model_dir)) != logits(base)


@pytest.mark.parametrize("zero_copy", ["auto", True, False])
def test_resident_weights_of_another_shape_are_not_taken(tmp_path: Path, new_client: NewClient, zero_copy: Any) -> None:
    key = WeightSetKey("a key that says too little")
    untied = write_model(tmp_path / "untied", tied=False, dtype=torch.float32)
    load_causal_lm(untied, new_client(), key=key)
    tied = write_model(tmp_path / "tied", tied=True, dtype=torch.bfloat16)
    model, report = load_causal_lm(tied, new_client(), key=key, zero_copy=zero_copy)
    assert report.source == "disk"
    assert "dtype" in (report.acquire_error or "")
    assert logits(model) == logits(from_pretrained(tied))


@pytest.mark.parametrize("zero_copy", [True, False])
def test_a_load_that_fails_frees_the_others_at_once(
    broker: BrokerProcess, model_dir: Path, new_client: NewClient, zero_copy: bool
) -> None:
    key = weight_set_key(model_dir)
    weights = model_dir / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[: len(good) // 2])
    with pytest.raises(Exception, match=r"(?i)incomplete|truncated|invalid|header|buffer"):
        load_causal_lm(model_dir, new_client(), key=key, zero_copy=zero_copy)
    assert broker.host().cold_load_lease_count == 0
    weights.write_bytes(good)
    _, report = load_causal_lm(model_dir, new_client(), key=key, zero_copy=zero_copy)
    assert report.source == "disk"
    assert report.publication is not None


def test_a_checkpoint_that_lacks_weights_is_not_offered_to_others(
    broker: BrokerProcess, model_dir: Path, new_client: NewClient
) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model_dir / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model_dir / "model.safetensors", {"format": "pt"})
    for zero_copy in (True, False):
        _, report = load_causal_lm(model_dir, new_client(), zero_copy=zero_copy)
        assert report.source == "disk"
        assert "model.layers.1.mlp.up_proj.weight" in (report.acquire_error or "")
        assert report.publication is None
    assert broker.host().publication_count == broker.host().cold_load_lease_count == 0


@pytest.mark.parametrize("zero_copy", [True, False])
def test_of_instances_that_start_together_one_reads_the_disk(
    model_dir: Path, new_client: NewClient, zero_copy: bool
) -> None:
    reports: list[LoadReport] = []

    def load(client: BrokerClient) -> None:
        reports.append(load_causal_lm(model_dir, client, zero_copy=zero_copy)[1])

    threads = [threading.Thread(target=load, args=(new_client(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(report.source for report in reports) == ["disk", "peer", "peer", "peer"]


def test_an_instance_that_does_not_publish_is_no_source(
    broker: BrokerProcess, model_dir: Path, new_client: NewClient
) -> None:
    for zero_copy in (True, False):
        _, report = load_causal_lm(model_dir, new_client(), zero_copy=zero_copy, publish=False)
        assert (report.source, report.publication) == ("disk", None)
    assert broker.host().publication_count == broker.host().cold_load_lease_count == 0
    load_causal_lm(model_dir, new_client())
    for zero_copy in (True, False):
        _, report = load_causal_lm(model_dir, new_client(), zero_copy=zero_copy, publish=False)
        assert (report.source, report.publication) == ("peer", None)
    assert broker.host().publication_count == 1


def test_the_key_names_the_checkpoint_and_what_makes_weights_of_it(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--Qwen--Qwen2-tiny" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    key = weight_set_key(write_model(snapshot))
    assert (key.model, key.revision, key.dtype) == ("Qwen/Qwen2-tiny", "0123abcd", "bfloat16")
    assert key.engine_attributes["architecture"] == "Qwen2ForCausalLM"
    assert weight_set_key(snapshot, dtype="float32").id != key.id
    moved = weight_set_key(shutil.copytree(snapshot, tmp_path / "elsewhere"))
    assert (moved.model, moved.checkpoint_digest) == ("elsewhere", key.checkpoint_digest)


def test_another_type_can_be_asked_for(model_dir: Path, new_client: NewClient) -> None:
    for source in ("disk", "peer"):
        model, report = load_causal_lm(model_dir, new_client(), dtype=torch.float32)
        assert (report.source, model.dtype) == (source, torch.float32)
        assert logits(model) == logits(from_pretrained(model_dir, dtype=torch.float32))
