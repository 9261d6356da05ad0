"""The parts of the demo, its checkpoint, the page cache, sizes and verdict, and how numbers are shown."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from weight_broker.cli import output
from weight_broker.demo import checkpoint as demo_checkpoint
from weight_broker.demo import page_cache
from weight_broker.demo.available_memory import PROCESS_BYTES, Plan, fitting_size
from weight_broker.demo.checkpoint import DEFAULT_SIZE, ensure_checkpoint, model_shape, parse_size
from weight_broker.demo.orders import Result
from weight_broker.demo.report import DemoReport
from weight_broker.integrations.checkpoint import checkpoint_digest, checkpoint_tensors

SIZE = 2 << 20


def ignore(done: int, of: int) -> None:
    """A report that nobody reads."""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("64M", 64 << 20),
        ("1g", 1 << 30),
        ("1.5G", 3 << 29),
        ("2GiB", 2 << 30),
        ("500MB", 500_000_000),
        ("1048576", 1 << 20),
    ],
)
def test_sizes_are_read_as_people_write_them(given: str, expected: int) -> None:
    assert parse_size(given) == expected


@pytest.mark.parametrize("given", ["", "G", "1X", "1MM", "-1G", "nan", "infG", "1K", "2T", "1 000M"])
def test_what_is_no_size_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match=r"size|range"):
        parse_size(given)


@pytest.mark.parametrize("size", [1 << 20, 4 << 20, 64 << 20, 512 << 20, DEFAULT_SIZE, 16 << 30])
def test_a_model_has_about_the_size_that_was_asked_for(size: int) -> None:
    assert model_shape(size).size_bytes == pytest.approx(size, rel=0.1)


def test_the_usual_model_has_the_shape_of_qwen2_with_half_a_billion_weights() -> None:
    shape = model_shape(DEFAULT_SIZE)
    found = shape.hidden, shape.intermediate, shape.layers, shape.vocabulary, shape.heads, shape.key_value_heads
    assert found == (896, 4864, 24, 151_936, 14, 2)


def test_a_model_is_written_once_and_the_same_everywhere(tmp_path: Path) -> None:
    reports: list[int] = []
    first = ensure_checkpoint(SIZE, lambda done, of: reports.append(done), directory=tmp_path / "a")
    assert reports[-1] == model_shape(SIZE).size_bytes
    assert reports == sorted(reports)
    reports.clear()
    assert ensure_checkpoint(SIZE, lambda done, of: reports.append(done), directory=tmp_path / "a") == first
    assert reports == []
    second = ensure_checkpoint(SIZE, ignore, directory=tmp_path / "b")
    assert checkpoint_digest(first, full=True, cache=False) == checkpoint_digest(second, full=True, cache=False)


def test_transformers_finds_every_weight_in_the_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    directory = ensure_checkpoint(SIZE, ignore, directory=tmp_path)
    model, problems = auto.from_pretrained(directory, output_loading_info=True)
    assert not any(problems[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(parameter.float().std() > 0.01 for parameter in model.parameters())


def test_writing_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_checkpoint(SIZE, interrupt, directory=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".qwen2-64x5-1024-seed20-v1.4194304.abc"
    left.mkdir()
    running = tmp_path / f".qwen2-64x5-1024-seed20-v1.{os.getpid()}.abc"
    running.mkdir()
    ensure_checkpoint(SIZE, ignore, directory=tmp_path)
    assert not left.exists()
    assert running.exists()


@pytest.mark.parametrize("damage", ["weights", "configuration", "missing"])
def test_a_damaged_model_is_written_again(tmp_path: Path, damage: str) -> None:
    directory = ensure_checkpoint(SIZE, ignore, directory=tmp_path)
    good = checkpoint_digest(directory, full=True, cache=False)
    weights = directory / "model.safetensors"
    if damage == "weights":
        os.truncate(weights, weights.stat().st_size - 1)
    elif damage == "configuration":
        (directory / "config.json").write_text("{}")
    else:
        weights.unlink()
    assert ensure_checkpoint(SIZE, ignore, directory=tmp_path) == directory
    assert checkpoint_digest(directory, full=True, cache=False) == good


def test_two_that_write_at_once_both_get_a_whole_model(tmp_path: Path) -> None:
    together = threading.Barrier(2)
    found: list[Path] = []

    def write() -> None:
        waited = False

        def report(done: int, of: int) -> None:
            nonlocal waited
            if not waited:
                waited = True
                together.wait(60)

        found.append(ensure_checkpoint(SIZE, report, directory=tmp_path))

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert [path.name for path in tmp_path.iterdir()] == [found[0].name]
    assert sum(tensor.size_bytes for tensor in checkpoint_tensors(found[0] / "model.safetensors")) == (
        model_shape(SIZE).size_bytes
    )


def test_too_little_space_is_found_out_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = demo_checkpoint.shutil.disk_usage(tmp_path)._replace(free=SIZE // 2)  # type: ignore[attr-defined]
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="MiB free"):
        ensure_checkpoint(SIZE, ignore, directory=tmp_path)


def test_the_page_cache_can_be_emptied_and_looked_at(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(3 << 20))
    assert page_cache.resident_share([file]) == 1.0
    page_cache.evict([file])
    share = page_cache.resident_share([file])
    if share == 1.0:
        pytest.skip("this file system keeps its pages in memory")
    assert share == 0.0
    with file.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        stream.seek(1 << 20)
        stream.read(1)
    assert 0.0 < (page_cache.resident_share([file]) or 0.0) < 0.1


def test_an_empty_file_is_not_in_the_page_cache(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert page_cache.resident_share([tmp_path / "empty"]) == 0.0


def test_a_smaller_model_is_taken_where_memory_is_short() -> None:
    plan = Plan(copying=2, mapping=1)
    assert fitting_size(DEFAULT_SIZE, plan, None) == DEFAULT_SIZE
    assert fitting_size(DEFAULT_SIZE, plan, 1 << 40) == DEFAULT_SIZE
    assert fitting_size(DEFAULT_SIZE, plan, 4 * PROCESS_BYTES + 4 * (256 << 20)) == 256 << 20
    assert fitting_size(DEFAULT_SIZE, plan, 0) == 16 << 20


DISK = Result(
    name="instance 1", source="disk", path="read", size_bytes=1000, ready_seconds=10.0, disk_seconds=5.0, phases={},
    publish_seconds=1.0, forward_seconds=1.0, disk_bytes=1000, logits_digest="same", verified="",
)  # fmt: skip
WARM = replace(DISK, name="warm disk", ready_seconds=2.0)
COPY = replace(
    DISK, name="instance 2", source="instance 1", path="copy", ready_seconds=0.5, disk_seconds=0.0,
    phases={"reserve": 0.1, "transfer": 0.2},
)  # fmt: skip
MAPPED = replace(COPY, name="instance 3", path="zero_copy", phases={"map": 0.01})


def test_the_verdict_is_good_only_if_all_logits_are_the_same() -> None:
    good = DemoReport(DISK, WARM, (COPY, MAPPED), cold_share=0.0)
    assert good.failures() == []
    bad = replace(good, others=(COPY, replace(MAPPED, logits_digest="other")))
    assert bad.failures() == ["instance 3: its logits differ from instance 1's"]
    assert replace(good, warm=replace(WARM, logits_digest="other")).failures()


def test_the_verdict_is_bad_if_an_instance_read_the_disk_or_had_a_problem() -> None:
    report = DemoReport(DISK, WARM, (replace(DISK, name="instance 2", problems=["no broker"]),), cold_share=0.0)
    assert report.failures() == ["instance 2: no broker", "instance 2: it read the disk"]


def test_speed_is_told_against_cold_and_warm_disk() -> None:
    first, warm, copied, mapped = DemoReport(DISK, WARM, (COPY, MAPPED), cold_share=0.001).to_json()["instances"]
    assert (copied["speed_up_against_cold_disk"], copied["speed_up_against_warm_disk"]) == (20.0, 4.0)
    assert copied["bytes_per_second"] == 5000.0
    assert mapped["bytes_per_second"] is None
    assert first["bytes_per_second"] == 200.0
    assert warm["speed_up_against_warm_disk"] == 1.0


@pytest.mark.parametrize(
    ("share", "words"), [(0.0, "emptied"), (0.5, "could not be emptied: 50%"), (None, "does not say")]
)
def test_a_load_that_was_not_cold_is_not_called_cold(share: float | None, words: str) -> None:
    report = DemoReport(DISK, WARM, (COPY,), cold_share=share)
    assert words in report.cold_sentence()
    cold = report.to_json()["instances"][2]["speed_up_against_cold_disk"]
    assert cold == (20.0 if share == 0.0 else None)
    json.dumps(report.to_json())


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (988_065_792, "988 MB"),
        (999_600, "1 MB"),
        (1_234_567_890, "1.23 GB"),
    ],
)
def test_bytes_are_shown_in_the_unit_that_fits(value: int, shown: str) -> None:
    assert output.size(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0000021, "2 us"), (0.0042, "4.2 ms"), (0.211, "211 ms"), (1.5, "1.5 s"), (100.2, "100 s"), (4000, "1h 6m")],
)
def test_durations_are_shown_with_three_digits(value: float, shown: str) -> None:
    assert output.seconds(value) == shown


@pytest.mark.parametrize(("value", "shown"), [(5, "5s"), (65, "1m 5s"), (3 * 3600 + 720, "3h 12m"), (90_000, "1d 1h")])
def test_ages_are_shown_in_two_units(value: float, shown: str) -> None:
    assert output.age(value) == shown
