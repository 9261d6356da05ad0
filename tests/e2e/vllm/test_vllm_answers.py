"""An engine that loads through the broker answers as one that loads from disk: the same tokens, the same log
probabilities, to the last digit."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.broker_process import BrokerProcess
from support.vllm_process import EngineProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

Start = Callable[..., EngineProcess]


def reports(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One for each rank."""
    return [report for (report,) in result["reports"]]


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("untied", {}),
        ("tied", {}),
        ("untied", {"dtype": "float32"}),
        ("moe", {}),
        ("untied", {"multiprocessing": True}),
        ("untied", {"tensor_parallel_size": 2}),
        ("untied", {"model_loader_extra_config": {"zero_copy": True}}),
    ],
    ids=["untied", "tied", "float32", "mixture-of-experts", "spawned", "two-ranks", "zero-copy"],
)
def test_weights_from_a_peer_give_the_answers_of_the_disk(
    broker: BrokerProcess, start_engine: Start, models: dict[str, Path], model: str, options: dict[str, Any]
) -> None:
    plain = {name: value for name, value in options.items() if name != "model_loader_extra_config"}
    from_disk = start_engine(models[model], through_broker=False, **plain).result()["digest"]
    first = start_engine(models[model], hold=True, **options).result()
    ranks = options.get("tensor_parallel_size", 1)
    assert [report["source"] for report in reports(first)] == ["disk"] * ranks
    assert all(report["publication_id"] for report in reports(first))
    second = start_engine(models[model], hold=True, **options).result()
    assert [report["source"] for report in reports(second)] == ["peer"] * ranks
    assert all(report["publication_id"] for report in reports(second)), "receivers are sources too"
    assert [first["digest"], second["digest"]] == [from_disk, from_disk]
    if ranks > 1:
        sources = {report["source_publication_id"] for report in reports(second)}
        groups = {one.load_group.group_id for one in broker.publications() if one.publication_id in sources}
        assert len(sources) == ranks
        assert len(groups) == 1, "all ranks from the ranks of one engine"


def test_experts_are_shared_as_post_processing_leaves_them_unless_it_packs_other_weights(
    broker: BrokerProcess, start_engine: Start, models: dict[str, Path]
) -> None:
    """Which weights vLLM packs depends on the processor. The answers do not."""
    from_disk = start_engine(models["moe"], through_broker=False).result()["digest"]
    processed: dict[str, Any] = {"model_loader_extra_config": {"stage": "runtime"}}
    first = start_engine(models["moe"], hold=True, **processed).result()
    second = start_engine(models["moe"], **processed).result()
    (publisher,), (receiver,) = reports(first), reports(second)
    if publisher["publication_id"]:
        assert receiver["source"] == "peer"
    else:
        assert "in no tensor any more" in publisher["not_published"]
        assert receiver["source"] == "disk"
    assert [first["digest"], second["digest"]] == [from_disk, from_disk]


def test_random_weights_answer_otherwise(start_engine: Start, models: dict[str, Path]) -> None:
    """So that the comparison can fail."""
    digests = [
        start_engine(models["untied"], through_broker=False, **options).result()["digest"]
        for options in ({}, {"load_format": "dummy"})
    ]
    assert digests[0] != digests[1]


def test_of_four_engines_at_once_one_reads_the_disk(
    broker: BrokerProcess, start_engine: Start, models: dict[str, Path]
) -> None:
    engines = [start_engine(models["untied"], hold=True) for _ in range(4)]
    results = [engine.result() for engine in engines]
    assert sorted(report["source"] for result in results for report in reports(result)) == ["disk", *["peer"] * 3]
    assert len({result["digest"] for result in results}) == 1
    assert len(broker.publications()) == 4


def test_the_server_that_the_readme_starts_loads_from_the_one_before(
    broker: BrokerProcess, start_engine: Start, models: dict[str, Path]
) -> None:
    question = {"model": str(models["untied"]), "prompt": [1, 2, 3], "max_tokens": 6, "temperature": 0}
    answers = []
    for source in ("disk", "peer"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = start_engine(models["untied"], port=port)
        server.ask("/health")
        (choice,) = server.ask("/v1/completions", {**question, "return_token_ids": True, "detokenize": False})[
            "choices"
        ]
        answers.append(choice["token_ids"])
        assert f"from {source}" in server.log
    assert answers[0] == answers[1]
    assert len(answers[0]) == 6
    assert len(broker.publications()) == 2
