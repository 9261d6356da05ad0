"""A model that SGLang's loader has filled through the broker holds what one that it has read from disk holds, to the
last bit, and is offered to others only as long as that is so."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.broker_process import BrokerProcess
from support.sglang_process import RankProcess
from support.vllm_models import write_qwen2

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

Start = Callable[..., list[RankProcess]]


def only(result: dict[str, Any]) -> dict[str, Any]:
    """The report on the one load of a process."""
    (report,) = result["reports"]
    assert isinstance(report, dict)
    return report


@pytest.mark.parametrize(
    ("model", "ranks", "extra"),
    [
        ("untied", 1, {}),
        ("tied", 1, {}),
        ("moe", 1, {}),
        ("untied", 2, {}),
        ("untied", 1, {"zero_copy": True}),
    ],
    ids=["untied", "tied", "mixture-of-experts", "two-ranks", "zero-copy"],
)
def test_weights_from_a_peer_are_those_of_the_disk(
    broker: BrokerProcess, start_engine: Start, models: dict[str, Path], model: str, ranks: int, extra: dict[str, Any]
) -> None:
    from_disk = [rank.result()["digest"] for rank in start_engine(models[model], ranks=ranks, load_format="auto")]
    first = [rank.result() for rank in start_engine(models[model], ranks=ranks, extra=extra)]
    assert [only(one)["source"] for one in first] == ["disk"] * ranks
    assert [only(one)["not_published"] for one in first] == [""] * ranks
    second = [rank.result() for rank in start_engine(models[model], ranks=ranks, extra=extra)]
    assert [only(one)["source"] for one in second] == ["peer"] * ranks
    assert all(only(one)["publication_id"] for one in second), "receivers are sources too"
    assert [one["digest"] for one in first] == from_disk
    assert [one["digest"] for one in second] == from_disk
    assert len({only(one)["weight_set_id"] for one in second}) == ranks
    if ranks > 1:
        sources = {only(one)["source_publication_id"] for one in second}
        groups = {one.load_group.group_id for one in broker.publications() if one.publication_id in sources}
        assert len(sources) == ranks
        assert len(groups) == 1, "all ranks from the ranks of one engine"


def test_random_weights_are_others(start_engine: Start, models: dict[str, Path]) -> None:
    """So that the comparison can fail."""
    digests = [start_engine(models["untied"], load_format=one)[0].result()["digest"] for one in ("auto", "dummy")]
    assert digests[0] != digests[1]


def test_of_four_engines_at_once_one_reads_the_disk(
    broker: BrokerProcess, start_engine: Start, models: dict[str, Path]
) -> None:
    engines = [start_engine(models["untied"])[0] for _ in range(4)]
    results = [engine.result() for engine in engines]
    assert sorted(only(result)["source"] for result in results) == ["disk", *["peer"] * 3]
    assert len({result["digest"] for result in results}) == 1


def test_half_the_ranks_unservable_sends_all_to_the_disk(
    broker: BrokerProcess, start_engine: Start, models: dict[str, Path]
) -> None:
    first = start_engine(models["untied"], ranks=2)
    digests = [rank.result()["digest"] for rank in first]
    first[1].do("update")
    assert len(broker.publications()) == 1
    second = [rank.result() for rank in start_engine(models["untied"], ranks=2)]
    assert [only(one)["source"] for one in second] == ["disk"] * 2
    assert [one["digest"] for one in second] == digests


def test_without_a_broker_the_disk_is_read_at_once(start_engine: Start, models: dict[str, Path]) -> None:
    result = start_engine(models["untied"])[0].result()
    assert only(result)["source"] == "disk"
    assert "BrokerUnavailable" in only(result)["acquire_error"]


def test_a_fine_tune_of_the_same_shape_under_the_same_path_is_another_model(
    broker: BrokerProcess, start_engine: Start, tmp_path: Path
) -> None:
    directory = write_qwen2(tmp_path / "model", seed=1)
    first = start_engine(directory)[0].result()
    shutil.rmtree(directory)
    write_qwen2(directory, seed=2)
    second = start_engine(directory)[0].result()
    assert only(second)["source"] == "disk"
    assert second["digest"] != first["digest"]
    assert second["digest"] == start_engine(directory, load_format="auto")[0].result()["digest"]


def test_after_a_transfer_that_broke_off_the_model_is_made_anew(
    broker: BrokerProcess, start_engine: Start, models: dict[str, Path]
) -> None:
    first = start_engine(models["untied"])[0].result()
    (engine,) = start_engine(
        models["untied"],
        before="from support.vllm_forced import break_transfers; break_transfers()",
        extra={"zero_copy": False},
    )
    second = engine.result()
    assert only(second)["source"] == "disk"
    assert "broken off by a test" in only(second)["acquire_error"]
    assert "the model is created again" in engine.log
    assert second["digest"] == first["digest"]


def test_weights_that_post_processing_rewrites_are_shared_as_they_were_loaded(
    broker: BrokerProcess, start_engine: Start, models: dict[str, Path]
) -> None:
    """Each engine then does its own post-processing."""
    doubling = (
        "from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod as M\n"
        "def doubled(self, layer):\n"
        "    import torch\n"
        "    layer.weight = torch.nn.Parameter(layer.weight.data * 2, requires_grad=False)\n"
        "M.process_weights_after_loading = doubled\n"
    )
    first = start_engine(models["untied"], before=doubling)[0].result()
    second = start_engine(models["untied"], before=doubling)[0].result()
    assert [only(first)["source"], only(second)["source"]] == ["disk", "peer"]
    assert second["digest"] == first["digest"]
    assert first["digest"] != start_engine(models["untied"], load_format="auto")[0].result()["digest"]
    assert len(broker.publications()) == 2


def test_a_release_leaves_a_copy_published_and_the_engines_own_weights_may_change(
    broker: BrokerProcess, start_engine: Start, models: dict[str, Path]
) -> None:
    """What is published in host memory is a copy of the loaded weights. test_engine_on_gpu.py has memory that is
    published in place."""
    (engine,) = start_engine(models["untied"])
    first = engine.result()
    for action in ("release", "scribble", "resume"):
        engine.do(action)
    second = start_engine(models["untied"])[0].result()
    assert only(second)["source"] == "peer"
    assert second["digest"] == first["digest"]


@pytest.mark.parametrize("action", ["update", "load_weights"])
def test_weights_that_are_to_change_are_retracted_first(
    broker: BrokerProcess, start_engine: Start, models: dict[str, Path], action: str
) -> None:
    (engine,) = start_engine(models["untied"])
    engine.result()
    assert len(broker.publications()) == 1
    assert "retracted" in only(engine.do(action))["not_published"]
    assert broker.publications() == []


def test_an_unknown_option_is_named_with_those_that_there_are(start_engine: Start, models: dict[str, Path]) -> None:
    log = start_engine(models["untied"], extra={"time_out": 3})[0].failure()
    assert "Did you mean timeout?" in log
    assert "fallback_load_format" in log


def test_strict_fails_instead_of_falling_back(start_engine: Start, models: dict[str, Path]) -> None:
    assert "BrokerUnavailable" in start_engine(models["untied"], extra={"strict": True})[0].failure()


def test_a_format_that_makes_models_in_its_own_way_is_loaded_without_the_broker(
    broker: BrokerProcess, start_engine: Start, models: dict[str, Path]
) -> None:
    result = start_engine(models["untied"], extra={"fallback_load_format": "dummy"})[0].result()
    assert "creates models differently" in only(result)["acquire_error"]
    assert broker.publications() == []
