"""Two checkpoints are never taken for each other, and a damaged one is not spread."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from support.broker_process import BrokerProcess
from support.models import logits, write_model
from support.waiting import eventually
from weight_broker import BrokerClient, LoadReport
from weight_broker.integrations.checkpoint import DamageCheck
from weight_broker.integrations.transformers import load_causal_lm, weight_set_key

NewClient = Callable[..., BrokerClient]
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def new_client(broker: BrokerProcess) -> Iterator[NewClient]:
    """Makes clients, each another instance to the broker."""
    with ExitStack() as stack:
        yield lambda name="": stack.enter_context(BrokerClient(broker.runtime_directory, name=name))


def as_read(directory: Path) -> str:
    auto: Any = AutoModelForCausalLM
    model: PreTrainedModel = auto.from_pretrained(directory)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return logits(model)


def load(directory: Path, client: BrokerClient, **options: Any) -> tuple[str, LoadReport]:
    model, report = load_causal_lm(directory, client, **options)
    return logits(model), report


def as_torch_saves(directory: Path, *, stray: bool) -> Path:
    """The same weights in pytorch_model.bin."""
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    if stray:
        save_file({"v_head.summary.weight": torch.ones(1, 96)}, directory / "value_head.safetensors")
    return directory


@pytest.mark.parametrize("stray", [True, False])
def test_two_runs_in_the_format_of_torch_are_two_weight_sets(
    tmp_path: Path, new_client: NewClient, stray: bool
) -> None:
    for run in (1, 2):
        directory = as_torch_saves(write_model(tmp_path / f"run{run}" / "merged", seed=run), stray=stray)
        found, report = load(directory, new_client())
        assert (report.source, report.publish_error, found) == ("disk", None, as_read(directory))
        found, report = load(directory, new_client())
        assert (report.source, found) == ("peer", as_read(directory))


def test_a_few_trained_tokens_make_another_weight_set(tmp_path: Path, new_client: NewClient) -> None:
    """Rows within the embedding differ, nothing else."""
    base, tuned = (write_model(tmp_path / run / "merged") for run in ("run1", "run2"))
    weights = load_file(tuned / "model.safetensors")
    weights["model.embed_tokens.weight"][500] += 1.0
    save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
    for directory in (base, tuned):
        found, report = load(directory, new_client())
        assert (report.source, found) == ("disk", as_read(directory))


def test_files_that_lack_the_tensors_of_the_model_are_not_its_checkpoint(tmp_path: Path, new_client: NewClient) -> None:
    """Another loader's rule chose them: nothing is published under their digest."""
    directory = write_model(tmp_path / "model")
    wanted = as_read(directory)
    stray = tmp_path / "stray"
    stray.mkdir()
    save_file({"v_head.summary.weight": torch.ones(1, 96)}, stray / "model.safetensors")
    key = weight_set_key(directory)
    model, report = load_causal_lm(directory, new_client(), key=key)
    assert (logits(model), report.source) == (wanted, "disk")
    shutil.copy(stray / "model.safetensors", directory / "value_head.safetensors")
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**settings, "transformers_weights": "value_head.safetensors"}))
    model, report = load_causal_lm(directory, new_client(), key=key)
    assert "the files of the checkpoint have 96 numbers" in (report.acquire_error or "")
    assert report.source == "disk"


@pytest.mark.parametrize("name", [b"mod\xe8le", b"two\nlines", "模型".encode(), b"a,b", b"x" * 250])
def test_a_directory_may_have_any_name(tmp_path: Path, new_client: NewClient, name: bytes) -> None:
    """Also one that safetensors and torch do not open, whose paths are UTF-8."""
    plain, directory = write_model(tmp_path / "model"), tmp_path / os.fsdecode(name)
    shutil.copytree(plain, directory)
    for source in ("disk", "peer"):
        found, report = load(directory, new_client())
        assert (report.source, report.acquire_error, found) == (source, None, as_read(plain))


def test_an_adapter_is_left_to_transformers(tmp_path: Path, new_client: NewClient) -> None:
    peft = pytest.importorskip("peft")
    base = write_model(tmp_path / "base")
    auto: Any = AutoModelForCausalLM
    adapted = peft.get_peft_model(auto.from_pretrained(base), peft.LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    found, report = load(tmp_path / "adapter", new_client())
    assert (report.source, found) == ("disk", as_read(tmp_path / "adapter"))
    assert "adapters are not served" in (report.acquire_error or "")


def test_the_weights_of_an_adapter_are_not_taken_for_those_of_a_model(tmp_path: Path, new_client: NewClient) -> None:
    """A directory with both: whether the adapter is applied depends on what is installed."""
    directory = write_model(tmp_path / "model")
    (directory / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(directory)}))
    _, report = load_or_fail(directory, new_client())
    assert report is None or (report.source, report.publication) == ("disk", None)


def load_or_fail(directory: Path, client: BrokerClient) -> tuple[str, LoadReport | None]:
    try:
        return load(directory, client)
    except Exception as error:  # noqa: BLE001  # what transformers raises without the package peft, or for half an adapter
        return str(error), None


def snapshot(directory: Path, *, damaged: bool = False) -> Path:
    """A model in the cache of the hub, whose weights have one flipped bit if it is damaged."""
    made = write_model(directory / "made")
    content = bytearray((made / "model.safetensors").read_bytes())
    name = hashlib.sha256(content).hexdigest()
    if damaged:
        content[len(content) // 2] ^= 1
    repository = directory / "models--acme--tiny"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / name).write_bytes(content)
    (made / "model.safetensors").unlink()
    (made / "model.safetensors").symlink_to(f"../../blobs/{name}")
    shutil.copytree(made, repository / "snapshots" / REVISION, symlinks=True)
    return repository / "snapshots" / REVISION


def test_a_link_to_a_snapshot_is_the_snapshot(tmp_path: Path, new_client: NewClient) -> None:
    directory = snapshot(tmp_path)
    (tmp_path / "production").symlink_to(directory)
    _, report = load(directory, new_client())
    eventually(lambda: report.publication is not None and report.publication.id != "")
    _, report = load(tmp_path / "production", new_client())
    assert report.source == "peer"
    key = weight_set_key(tmp_path / "production")
    assert (key.model, key.revision, key.checkpoint_digest[:11]) == ("acme/tiny", REVISION, "hub-sha256:")


def test_a_damaged_checkpoint_serves_its_own_process_only(
    tmp_path: Path, broker: BrokerProcess, new_client: NewClient, caplog: pytest.LogCaptureFixture
) -> None:
    directory = snapshot(tmp_path, damaged=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found, report = load(directory, new_client())
            assert (report.source, found) == ("disk", as_read(directory))
            if report.publication is not None:  # the comparison had not ended
                waiting = report.publication.waiting
                assert waiting is not None
                ended = threading.Event()
                waiting.then(lambda refusal, ended=ended: ended.set())  # type: ignore[misc]
                assert ended.wait(60)
    assert str(directory / "model.safetensors") in caplog.text + (report.publish_error or "")
    assert broker.host().publication_count == 0


def test_the_model_serves_before_its_checkpoint_was_compared(
    tmp_path: Path, broker: BrokerProcess, new_client: NewClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    compare = DamageCheck._sha256

    def held(check: DamageCheck, file: Path) -> str:
        assert go_on.wait(60)
        return compare(check, file)

    monkeypatch.setattr(DamageCheck, "_sha256", held)
    directory = snapshot(tmp_path)
    found, report = load(directory, new_client())
    assert (report.source, found, report.publish_error) == ("disk", as_read(directory), None)
    assert report.publication is not None
    assert (report.publication.id, broker.host().publication_count) == ("", 0)
    outcomes: list[LoadReport] = []
    waiter = threading.Thread(target=lambda: outcomes.append(load(directory, new_client())[1]))
    waiter.start()
    eventually(lambda: broker.host().waiting_acquisition_count == 1)
    go_on.set()
    waiter.join(60)
    assert [outcome.source for outcome in outcomes] == ["peer"]
    assert report.publication.id != ""


@pytest.mark.parametrize("end", ["retract", "close"])
def test_a_publication_that_waits_can_be_taken_back(
    tmp_path: Path, broker: BrokerProcess, new_client: NewClient, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    go_on = threading.Event()
    compare = DamageCheck._sha256

    def held(check: DamageCheck, file: Path) -> str:
        assert go_on.wait(60)
        return compare(check, file)

    monkeypatch.setattr(DamageCheck, "_sha256", held)
    client = new_client()
    _, report = load(snapshot(tmp_path), client)
    assert report.publication is not None
    assert report.publication.waiting is not None
    if end == "retract":
        report.publication.retract()
    else:
        client.close()
    ended = threading.Event()
    report.publication.waiting.then(lambda refusal: ended.set())
    go_on.set()
    assert ended.wait(60)
    assert report.publication.is_retracted
    assert broker.host().publication_count == 0


def test_without_a_thread_the_checkpoint_is_compared_first(
    tmp_path: Path, broker: BrokerProcess, new_client: NewClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name in {"checkpoint-damage", "publish-checked"}:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    for damaged in (False, True):
        directory = snapshot(tmp_path / str(damaged), damaged=damaged)
        _, report = load(directory, new_client())
        assert report.publication is None if damaged else report.publication is not None and report.publication.id
        assert ("is damaged" in (report.publish_error or "")) is damaged
    assert broker.host().publication_count == 1
