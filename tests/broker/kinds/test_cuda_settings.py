"""Whether GPUs are looked for, what their processes are told, and that a host without one does nothing for it."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from support.kinds import RecordedEvents
from weight_broker.drivers.cuda import ARGUMENTS, LIBRARY
from weight_broker.key import WeightSetKey
from weight_broker.layout import Layout, TensorSpec
from weight_brokerd.attach.stage import StagingConnections
from weight_brokerd.config.loading import Config, load
from weight_brokerd.core.model import Acquisition, DataPlane, IfAbsent, TransferPath
from weight_brokerd.core.publications import Offer, Publications
from weight_brokerd.core.transfers import data_plane_between
from weight_brokerd.kinds.cuda import settings as cuda_settings
from weight_brokerd.kinds.cuda.settings import cuda_configuration, why_no_gpus
from weight_brokerd.kinds.host.regions import RegionTable
from weight_brokerd.kinds.registry import Kinds
from weight_brokerd.kinds.setup import make_kinds


def configured(**values: Any) -> Config:
    return load(None, {f"WEIGHT_BROKER_{name.upper()}": str(value) for name, value in values.items()})


def kinds_of(config: Config, directory: Path) -> Kinds:
    staging = StagingConnections(lambda _instance_id, _why: None)
    return make_kinds(config, directory, RegionTable(regions_per_instance=8), staging, RecordedEvents())


@pytest.fixture
def _loader_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", refuse)


@pytest.mark.usefixtures("_loader_finds_nothing")
def test_a_host_without_the_driver_has_no_devices_and_says_nothing(tmp_path: Path) -> None:
    with capture_logs() as logs:
        assert kinds_of(Config(), tmp_path).served == {"cpu"}
    assert {entry["log_level"] for entry in logs} <= {"debug"}


@pytest.mark.usefixtures("_loader_finds_nothing")
def test_whoever_says_that_there_are_gpus_is_believed(tmp_path: Path) -> None:
    assert kinds_of(configured(cuda_enabled="on"), tmp_path).served == {"cpu", "cuda"}


def test_gpus_can_be_left_out_although_there_is_a_driver(tmp_path: Path) -> None:
    (tmp_path / LIBRARY).touch()
    assert why_no_gpus(configured(cuda_library_path=tmp_path)) == ""
    assert why_no_gpus(configured(cuda_library_path=tmp_path, cuda_enabled="off")) == "cuda.enabled is 'off'"
    assert LIBRARY in why_no_gpus(configured(cuda_library_path=tmp_path / "elsewhere"))


def test_their_processes_take_as_long_as_those_of_cards() -> None:
    told = cuda_configuration(
        configured(cuda_library_path="/opt/cuda", cards_exit_seconds=7, cards_receivers_per_card=3)
    )
    assert (told.kind, told.library_path, told.exit_seconds, told.receivers_per_card) == ("cuda", "/opt/cuda", 7, 3)
    assert told.preload == ""
    assert told.log_directory is None
    assert cuda_settings.cuda_configuration(Config()).transfer_seconds == Config().cards.transfer_seconds


@pytest.mark.parametrize(
    ("kind", "source", "destination", "expected"),
    [
        ("cuda", "GPU-a", "GPU-a", DataPlane.LOCAL),
        ("cuda", "GPU-a", "GPU-b", DataPlane.LOCAL),
        ("npu", "npu:0", "npu:0", DataPlane.LOCAL),
        ("npu", "npu:0", "npu:1", DataPlane.DATASYSTEM),
        ("cpu", "", "", DataPlane.LOCAL),
    ],
)
def test_between_gpus_of_a_host_the_driver_copies(
    kind: str, source: str, destination: str, expected: DataPlane
) -> None:
    key, layout = WeightSetKey("m"), Layout([TensorSpec("w", "int8", (4,), (1,), 4)])
    offer = Offer(key, layout, "instance-1", kind, source, 0, "request")
    publications = Publications(host_id="here", first_generation=1, limit=1, readers_per_publication=1)
    publication = publications.add(offer, instance_name="first", now=0.0)
    acquisition = Acquisition(
        "acquisition-1", key, layout, "instance-2", IfAbsent.FAIL, kind, destination, TransferPath.COPY, 0.0, 1.0
    )
    assert data_plane_between(publication, acquisition, "here") is expected


def test_the_double_has_every_function_that_is_called() -> None:
    sources = (Path(__file__).parents[2] / "doubles" / "cuda").glob("*.c")
    source = "".join(path.read_text() for path in sources)
    assert [name for name in ARGUMENTS if f"API int {name}(" not in source] == []
