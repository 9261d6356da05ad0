"""What an engine read under a key is what the key covers, and whole; shown on an engine of one layer."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from support.broker_process import BrokerProcess
from support.checkpoints import write_file
from support.waiting import eventually
from weight_broker import WeightSetKey
from weight_broker.integrations.checkpoint import CoveredWeights, DamageCheck, checkpoint_digest
from weight_broker.integrations.engine import published
from weight_broker.integrations.engine.engine import Engine
from weight_broker.integrations.engine.load import Load
from weight_broker.integrations.engine.options import Options
from weight_broker.integrations.engine.report import EngineLoad

SIZE = 8


class Small(Engine):
    """Covers some files, and reads one file."""

    logger = logging.getLogger("weight_broker.small")
    model = "small"

    def __init__(self, covered: list[Path], read: Path) -> None:
        super().__init__()
        self._files, self._read = covered, read

    def make_key(self, options: Options) -> WeightSetKey:
        self.covered = CoveredWeights(self._files)
        digest = checkpoint_digest(self._files[0].parent, files=self._files, cache=False)
        return WeightSetKey("small", checkpoint_digest=digest, dtype="uint8")

    def ranks(self, key: WeightSetKey) -> None:
        return None

    def load_weights(self, model: nn.Module) -> None:
        for name, tensor in self.covered.noted(load_file(self._read).items()):
            model.get_buffer(name).copy_(tensor)

    def watch(self, model: nn.Module) -> None:
        pass


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    for entry in list(published._published):
        entry.client.close()
    published._published.clear()


def loaded(broker: BrokerProcess, engine: Engine) -> EngineLoad:
    model = nn.Module()
    model.register_buffer("weight", torch.zeros(SIZE, dtype=torch.uint8))
    load = Load(Options(runtime_directory=str(broker.runtime_directory), timeout=10), engine)
    load.prepare()
    load.weights(model)
    load.finish(model)
    assert model.get_buffer("weight").tolist() == [7] * SIZE
    return load.report


def weights(path: Path, name: str = "weight") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, {name: b"\x07" * SIZE})
    return path


def blob(directory: Path, *, damaged: bool = False) -> Path:
    """The weights in the cache of the hub; damaged, they have another name than their SHA-256."""
    file = weights(directory / "models--acme--tiny/blobs/new")
    name = hashlib.sha256(file.read_bytes()).hexdigest()
    kept = file.rename(file.with_name(name[::-1] if damaged else name))
    link = directory / "model.safetensors"
    link.symlink_to(kept)
    return link


def test_files_that_the_key_covers_are_published(tmp_path: Path, broker: BrokerProcess) -> None:
    file = weights(tmp_path / "model.safetensors")
    assert loaded(broker, Small([file], file)).publication_id
    assert loaded(broker, Small([file], file)).source == "peer"


def test_tensors_of_other_files_are_not_published(tmp_path: Path, broker: BrokerProcess) -> None:
    stray, read = weights(tmp_path / "stray.safetensors", "v_head"), weights(tmp_path / "read.safetensors")
    report = loaded(broker, Small([stray], read))
    assert "in no file of the key: weight" in report.not_published
    assert (report.source, report.publication_id, broker.host().publication_count) == ("disk", "", 0)


def test_a_damaged_file_of_the_hub_is_not_published(tmp_path: Path, broker: BrokerProcess) -> None:
    file = blob(tmp_path, damaged=True)
    report = loaded(broker, Small([file], file))
    eventually(lambda: f"{file} is damaged" in report.not_published)
    assert (report.publication_id, broker.host().publication_count) == ("", 0)
    assert published._published == []


def test_an_engine_serves_while_its_files_are_compared(
    tmp_path: Path, broker: BrokerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    compare = DamageCheck._sha256

    def held(check: DamageCheck, file: Path) -> str:
        assert go_on.wait(60)
        return compare(check, file)

    monkeypatch.setattr(DamageCheck, "_sha256", held)
    file = blob(tmp_path)
    report = loaded(broker, Small([file], file))
    assert (report.publication_id, broker.host().publication_count) == ("", 0)
    assert "is being compared" in report.not_published
    go_on.set()
    eventually(lambda: report.publication_id != "")
    assert (report.not_published, broker.host().publication_count) == ("", 1)


def test_weights_that_are_taken_back_while_their_files_are_compared_stay_private(
    tmp_path: Path, broker: BrokerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, ended = threading.Event(), threading.Event()
    compare = DamageCheck._sha256

    def held(check: DamageCheck, file: Path) -> str:
        assert go_on.wait(60)
        return compare(check, file)

    monkeypatch.setattr(DamageCheck, "_sha256", held)
    file = blob(tmp_path)
    report = loaded(broker, Small([file], file))
    [entry] = published._published
    assert entry.publication is not None
    assert entry.publication.waiting is not None
    entry.publication.waiting.then(lambda refusal: ended.set())
    assert published.retract("weights change") == 1
    go_on.set()
    assert ended.wait(60)
    assert report.not_published == "retracted: weights change"
    assert broker.host().publication_count == 0
