"""What cannot be shared is not shared, and what cannot be had from a peer is read from disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.broker_process import BrokerProcess
from support.vllm_models import write_qwen2
from support.vllm_process import EngineProcess
from support.waiting import eventually
from weight_broker.v1 import inspection_service_pb2 as inspection

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

Start = Callable[..., EngineProcess]

FORCED = "from support.vllm_forced import install; install({role!r})"


COPYING: dict[str, Any] = {"model_loader_extra_config": {"zero_copy": False}}
"""A transfer that takes time and writes to the model's own memory."""


PICKY = """
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod as Method
process = Method.process_weights_after_loading
def picky(self, layer, process=process):
    assert layer.w13_weight.abs().max() > 0.01, "out of range"
    process(self, layer)
Method.process_weights_after_loading = picky
"""


def only(result: dict[str, Any]) -> dict[str, Any]:
    """The report of an engine of one rank."""
    ((report,),) = result["reports"]
    assert isinstance(report, dict)
    return report


def test_weights_that_are_to_be_shared_as_processed_and_cannot_are_not_published(
    broker: BrokerProcess, start_engine: Start, models: dict[str, Path]
) -> None:
    plain = start_engine(models["untied"], through_broker=False).result()
    runtime: dict[str, Any] = {"model_loader_extra_config": {"stage": "runtime"}}
    first = start_engine(models["untied"], hold=True, **runtime).result()
    report = only(first)
    assert (report["source"], report["publication_id"]) == ("disk", "")
    assert "no quantization method of this model is on the list" in report["not_published"]
    second = only(other := start_engine(models["untied"], **runtime).result())
    assert second["source"] == "disk", "an engine does not wait for what cannot be published"
    assert "cannot be published" in second["acquire_error"]
    assert [first["digest"], other["digest"]] == [plain["digest"]] * 2
    answer = broker.inspection.Explain(inspection.ExplainRequest(weight_set_id=report["weight_set_id"]), timeout=60)
    assert answer.outcome == inspection.ExplainResponse.OUTCOME_UNPUBLISHABLE
    assert "no quantization method" in answer.summary


def test_without_a_broker_the_disk_is_read_at_once(start_engine: Start, models: dict[str, Path]) -> None:
    plain = start_engine(models["untied"], through_broker=False).result()
    result = start_engine(models["untied"]).result()
    report = only(result)
    assert result["digest"] == plain["digest"]
    assert report["source"] == "disk"
    assert "BrokerUnavailable" in report["acquire_error"]


def test_strict_fails_instead_of_falling_back(start_engine: Start, models: dict[str, Path]) -> None:
    engine = start_engine(models["untied"], model_loader_extra_config={"strict": True})
    assert "BrokerUnavailable" in engine.failure()


def test_a_fine_tune_of_the_same_shape_under_the_same_path_is_another_model(
    broker: BrokerProcess, start_engine: Start, tmp_path: Path
) -> None:
    directory = write_qwen2(tmp_path / "model", seed=1)
    first = start_engine(directory, hold=True).result()
    shutil.rmtree(directory)
    write_qwen2(directory, seed=2)
    second = start_engine(directory).result()
    assert only(second)["source"] == "disk"
    assert only(second)["weight_set_id"] != only(first)["weight_set_id"]
    assert second["digest"] != first["digest"]
    assert second["digest"] == start_engine(directory, through_broker=False).result()["digest"]


def test_another_revision_is_another_model(broker: BrokerProcess, start_engine: Start, models: dict[str, Path]) -> None:
    first = start_engine(models["untied"], hold=True).result()
    second = start_engine(models["untied"], revision="other").result()
    assert only(second)["source"] == "disk"
    assert second["digest"] == first["digest"]


def test_a_broker_that_is_killed_while_an_engine_waits_sends_it_to_the_disk(
    broker: BrokerProcess, start_engine: Start, models: dict[str, Path]
) -> None:
    slow = "import time\nfrom weight_broker.integrations.engine.load import Load\n"
    slow += "Load._offer = lambda *_, **__: time.sleep(1e6)\n"
    start_engine(models["untied"], before=slow)  # it holds the lease and does not get on
    eventually(lambda: broker.host().cold_load_lease_count == 1, within=900, every=0.5)
    waiting = start_engine(models["untied"])
    eventually(lambda: broker.host().waiting_acquisition_count == 1, within=900, every=0.1)
    broker.kill()
    report = only(waiting.result())
    assert report["source"] == "disk"
    assert "BrokerUnavailable" in report["acquire_error"]


def test_a_broker_that_is_killed_while_bytes_move_costs_the_publication_alone(
    broker: BrokerProcess, start_engine: Start, models: dict[str, Path], tmp_path: Path
) -> None:
    """In host memory a transfer is between the instances: what is mapped stays, and is verified here."""
    first = start_engine(models["untied"], hold=True).result()
    holding = f"from support.vllm_forced import hold_transfers; hold_transfers({str(tmp_path)!r})"
    engine = start_engine(models["untied"], before=holding, **COPYING)
    eventually((tmp_path / "moving").exists, within=900, every=0.1)
    broker.kill()
    (tmp_path / "go").touch()
    second = engine.result()
    assert only(second)["source"] == "peer"
    assert only(second)["publication_id"] == ""
    assert second["digest"] == first["digest"]


def test_a_broker_that_is_killed_while_bytes_move_to_several_ranks_sends_all_to_the_disk(
    broker: BrokerProcess, start_engine: Start, models: dict[str, Path], tmp_path: Path
) -> None:
    """Whether the other ranks have every byte is the broker's to say."""
    first = start_engine(models["untied"], tensor_parallel_size=2, hold=True).result()
    holding = f"from support.vllm_forced import hold_transfers; hold_transfers({str(tmp_path)!r})"
    engine = start_engine(models["untied"], tensor_parallel_size=2, in_every_process=holding, **COPYING)
    eventually((tmp_path / "moving").exists, within=900, every=0.1)
    broker.kill()
    (tmp_path / "go").touch()
    second = engine.result()
    assert [report["source"] for (report,) in second["reports"]] == ["disk"] * 2
    assert second["digest"] == first["digest"]


@pytest.mark.parametrize("model", ["untied", "moe"])
def test_after_a_transfer_that_broke_off_the_model_is_made_anew(
    broker: BrokerProcess, start_engine: Start, models: dict[str, Path], model: str
) -> None:
    first = start_engine(models[model], hold=True).result()
    breaking = "from support.vllm_forced import break_transfers; break_transfers()"
    engine = start_engine(models[model], before=breaking, hold=True, **COPYING)
    second = engine.result()
    assert only(second)["source"] == "disk"
    assert "broken off by a test" in only(second)["acquire_error"]
    assert only(second)["publication_id"], "what it read from disk is a source"
    assert second["digest"] == first["digest"]
    assert "the model is created again" in engine.log or model == "moe"


def test_post_processing_that_fails_on_dummy_weights_does_not_end_the_engine(
    broker: BrokerProcess, start_engine: Start, models: dict[str, Path]
) -> None:
    plain = start_engine(models["moe"], through_broker=False).result()
    engine = start_engine(models["moe"], before=PICKY, model_loader_extra_config={"stage": "runtime"})
    result = engine.result()
    assert result["digest"] == plain["digest"]
    assert only(result)["source"] == "disk"
    assert "does not work on dummy weights (AssertionError: out of range)" in only(result)["not_published"]


def test_half_the_ranks_unservable_sends_all_to_the_disk(
    broker: BrokerProcess, start_engine: Start, models: dict[str, Path]
) -> None:
    first = start_engine(models["untied"], tensor_parallel_size=2, hold=True, calls=["retract 1"]).result()
    assert len(broker.publications()) == 1
    second = start_engine(models["untied"], tensor_parallel_size=2).result()
    assert [report["source"] for (report,) in second["reports"]] == ["disk"] * 2
    assert second["digest"] == first["digest"]


def test_publishing_what_post_processing_left_corrupts_silently(
    broker: BrokerProcess, start_engine: Start, models: dict[str, Path]
) -> None:
    """Why weights are published before post-processing, which packs float32 weights into objects that no tensor shows.
    Forced into the other order, the answers are others, and nothing says so. A test of the tests above."""
    plain = start_engine(models["untied"], through_broker=False, dtype="float32").result()
    start_engine(models["untied"], dtype="float32", before=FORCED.format(role="publish"), hold=True).result()
    forced = start_engine(models["untied"], dtype="float32", before=FORCED.format(role="acquire")).result()
    assert forced["digest"] != plain["digest"]


def test_an_unknown_option_is_named_with_those_that_there_are(start_engine: Start, models: dict[str, Path]) -> None:
    log = start_engine(models["untied"], model_loader_extra_config={"time_out": 3}).failure()
    assert "Did you mean timeout?" in log
    assert "fallback_load_format" in log
