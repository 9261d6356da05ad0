"""The checkpoint digest: what changes it, what does not, and what is refused."""

from __future__ import annotations

import json
import os
import struct
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from weight_broker.integrations import checkpoint, checkpoint_cache
from weight_broker.integrations.checkpoint import CheckpointError, checkpoint_digest

BLOCK = checkpoint.SAMPLE_BYTES
TENSORS = {"large": bytes(range(256)) * 256, "small": b"abcd" * 8, "empty": b""}


@pytest.fixture(autouse=True)
def cache_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    path = tmp_path / "cache" / "digests.json"
    monkeypatch.setenv(checkpoint_cache.ENVIRONMENT_VARIABLE, str(path))
    return path


def write_file(path: Path, tensors: Mapping[str, bytes], *, padding: int = 0) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, content in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(content)], "data_offsets": [offset, offset + len(content)]}
        offset += len(content)
    text = json.dumps(header).encode() + b" " * padding
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(tensors.values()))


def write_checkpoint(directory: Path, tensors: Mapping[str, bytes] = TENSORS, **settings: object) -> Path:
    directory.mkdir(exist_ok=True)
    write_file(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps({"hidden_size": 8, **settings}))
    return directory


def write_shards(directory: Path, shards: Mapping[str, Mapping[str, bytes]]) -> Path:
    directory.mkdir()
    for name, tensors in shards.items():
        write_file(directory / name, tensors)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps({"hidden_size": 8}))
    return directory


def settle() -> None:
    """Waits until what was written before counts as settled."""
    time.sleep(0.03)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes files count as settled soon after they were written."""
    monkeypatch.setattr(checkpoint_cache, "_SETTLED_NANOSECONDS", 10_000_000)


def with_byte(content: bytes, position: int) -> bytes:
    changed = bytearray(content)
    changed[position] ^= 1
    return bytes(changed)


@pytest.mark.parametrize("position", [0, BLOCK - 1, -BLOCK, -1])
def test_a_fine_tune_of_the_same_shape_has_another_digest(tmp_path: Path, position: int) -> None:
    base = write_checkpoint(tmp_path / "base")
    tuned = write_checkpoint(tmp_path / "tuned", {**TENSORS, "large": with_byte(TENSORS["large"], position)})
    assert checkpoint_digest(base) != checkpoint_digest(tuned)


def test_every_byte_of_a_small_tensor_counts(tmp_path: Path) -> None:
    content = bytes(2 * BLOCK)
    base = checkpoint_digest(write_checkpoint(tmp_path / "base", {"one": content}))
    for position in (0, BLOCK - 1, BLOCK, 2 * BLOCK - 1):
        other = write_checkpoint(tmp_path / f"at{position}", {"one": with_byte(content, position)})
        assert checkpoint_digest(other) != base


def test_only_the_full_digest_sees_the_middle_of_a_large_tensor(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base")
    edited = write_checkpoint(tmp_path / "edited", {**TENSORS, "large": with_byte(TENSORS["large"], 2 * BLOCK)})
    assert checkpoint_digest(base) == checkpoint_digest(edited)
    assert checkpoint_digest(base, full=True) != checkpoint_digest(edited, full=True)


def test_two_exchanged_tensors_of_the_same_size_change_the_digest(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {"one": b"aaaa", "two": b"bbbb"})
    other = write_checkpoint(tmp_path / "other", {"one": b"bbbb", "two": b"aaaa"})
    assert checkpoint_digest(base) != checkpoint_digest(other)


def test_a_setting_of_the_configuration_changes_the_digest(tmp_path: Path) -> None:
    base = checkpoint_digest(write_checkpoint(tmp_path / "base", rope_theta=1e4))
    assert checkpoint_digest(write_checkpoint(tmp_path / "other", rope_theta=1e6)) != base
    resaved = write_checkpoint(tmp_path / "resaved", transformers_version="9.9", rope_theta=1e4)
    assert checkpoint_digest(resaved) == base


def test_the_digest_does_not_depend_on_path_sharding_or_other_files(tmp_path: Path) -> None:
    whole = write_checkpoint(tmp_path / "whole")
    (whole / "tokenizer.json").write_text("{}")
    (whole / "consolidated.safetensors").write_text("not looked at")
    sharded = write_shards(
        tmp_path / "sharded",
        {"a.safetensors": {"small": TENSORS["small"]}, "b.safetensors": {k: TENSORS[k] for k in ("empty", "large")}},
    )
    assert checkpoint_digest(whole) == checkpoint_digest(sharded)
    assert checkpoint_digest(whole, full=True) == checkpoint_digest(sharded, full=True)


def test_the_kind_of_digest_is_in_the_text(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "base")
    kind, _, value = checkpoint_digest(directory).partition(":")
    assert (kind, len(value)) == ("sampled-sha256", 32)
    assert checkpoint_digest(directory, full=True).startswith("full-sha256:")


def test_damage_is_named(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "base")
    file = directory / "model.safetensors"
    good = file.read_bytes()
    for content, message in (
        (good[:-1], "ends before tensor 'small' does"),
        (good[:20], "cut off"),
        (b"", "cut off"),
        (struct.pack("<Q", 1 << 40) + good[8:], "cut off"),
        (struct.pack("<Q", 4) + b"oops", "not JSON"),
        (struct.pack("<Q", 2) + b"[]", "not a JSON object"),
        (struct.pack("<Q", 8) + b'{"a": 1}', "damaged header entry for 'a'"),
        (struct.pack("<Q", 2) + b"{}", "no tensors"),
    ):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            checkpoint_digest(directory)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        checkpoint_digest(tmp_path / "absent")
    (tmp_path / "bare").mkdir()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors file"):
        checkpoint_digest(tmp_path / "bare")
    sharded = write_shards(tmp_path / "sharded", {"a.safetensors": {"one": b"1"}, "b.safetensors": {"two": b"2"}})
    (sharded / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names b\.safetensors, which is missing"):
        checkpoint_digest(sharded)


def test_an_index_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    directory = write_shards(tmp_path / "sharded", {"a.safetensors": {"one": b"1"}})
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"one": "../a.safetensors"}}')
    with pytest.raises(CheckpointError, match="not a file of the same directory"):
        checkpoint_digest(directory)


@pytest.mark.usefixtures("settled")
def test_an_unchanged_checkpoint_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_checkpoint(tmp_path / "base")
    settle()
    first = checkpoint_digest(directory)
    monkeypatch.setattr(checkpoint, "_compute", lambda *_: pytest.fail("the files were read again"))
    assert checkpoint_digest(directory) == first


@pytest.mark.usefixtures("settled")
def test_a_change_that_keeps_size_and_modification_time_is_seen(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "base")
    file = directory / "model.safetensors"
    settle()
    before, times = checkpoint_digest(directory), file.stat()
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\xff")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    settle()
    assert file.stat().st_mtime_ns == times.st_mtime_ns
    assert checkpoint_digest(directory) != before


def test_a_file_that_changed_a_moment_ago_is_not_remembered(tmp_path: Path, cache_file: Path) -> None:
    checkpoint_digest(write_checkpoint(tmp_path / "base"))
    assert not cache_file.exists()


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b'{"form":1}', b'{"form":1,"digests":[]}', b'{"form":1,"digests":{"x":7}}', b"\xff\xfe"],
)
def test_a_damaged_cache_is_ignored_and_replaced(tmp_path: Path, cache_file: Path, damage: bytes) -> None:
    directory = write_checkpoint(tmp_path / "base")
    settle()
    expected = checkpoint_digest(directory, cache=False)
    cache_file.parent.mkdir()
    cache_file.write_bytes(damage)
    assert checkpoint_digest(directory) == expected
    assert expected in cache_file.read_text()


@pytest.mark.usefixtures("settled")
def test_a_cache_that_others_can_write_is_not_believed(tmp_path: Path, cache_file: Path) -> None:
    directory = write_checkpoint(tmp_path / "base")
    settle()
    expected = checkpoint_digest(directory)
    cache_file.write_text(cache_file.read_text().replace(expected, "sampled-sha256:forged"))
    assert checkpoint_digest(directory) == "sampled-sha256:forged"  # the user's own file is believed
    cache_file.chmod(0o622)
    assert checkpoint_digest(directory) == expected


@pytest.mark.usefixtures("settled")
def test_the_cache_can_be_turned_off(tmp_path: Path, cache_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_checkpoint(tmp_path / "base")
    settle()
    checkpoint_digest(directory, cache=False)
    monkeypatch.setenv(checkpoint_cache.ENVIRONMENT_VARIABLE, "off")
    checkpoint_digest(directory)
    assert not cache_file.exists()


@pytest.mark.usefixtures("settled")
def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path, cache_file: Path) -> None:
    directory = write_checkpoint(tmp_path / "base")
    settle()
    cache_file.parent.write_text("a file where the directory should be")
    assert checkpoint_digest(directory) == checkpoint_digest(directory, cache=False)


def test_writers_at_the_same_time_leave_a_whole_file(tmp_path: Path) -> None:
    store = checkpoint_cache.CheckpointCache(tmp_path / "shared.json")

    def write(number: int) -> None:
        for index in range(20):
            store.put(f"{number}-{index}", "digest")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if store.path is not None and store.path.exists():
            assert json.loads(store.path.read_text())["form"] == 1
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["shared.json"]


def test_the_cache_keeps_the_newest_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_cache, "MAX_ENTRIES", 3)
    store = checkpoint_cache.CheckpointCache(tmp_path / "shared.json")
    for number in range(5):
        monkeypatch.setattr(time, "time", lambda number=number: 1000.0 + number)
        store.put(f"signature{number}", f"digest{number}")
    assert [store.get(f"signature{number}") for number in range(5)] == [None, None, "digest2", "digest3", "digest4"]


def test_a_caller_that_reads_other_files_has_the_digest_of_those(tmp_path: Path) -> None:
    """As vLLM does, which goes by the index where a directory has both."""
    directory = write_shards(
        tmp_path / "model", {"a.safetensors": {"one": b"1" * 9}, "b.safetensors": {"two": b"2" * 9}}
    )
    write_file(directory / "model.safetensors", {"one": b"1" * 9, "two": b"2" * 9})
    shards = checkpoint.checkpoint_files(directory, index_first=True)
    assert [file.name for file in shards] == ["a.safetensors", "b.safetensors"]
    before = checkpoint_digest(directory, files=shards)
    write_file(directory / "b.safetensors", {"two": b"3" * 9})
    assert checkpoint_digest(directory, files=shards) != before
    assert checkpoint_digest(directory) == checkpoint_digest(directory, files=[directory / "model.safetensors"])


def test_of_a_tensor_in_several_chosen_files_the_order_counts(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", {"one": b"1" * 9})
    write_file(directory / "other.safetensors", {"one": b"2" * 9})
    files = [directory / "model.safetensors", directory / "other.safetensors"]
    assert checkpoint_digest(directory, files=files) != checkpoint_digest(directory, files=files[::-1])
    assert checkpoint_digest(directory, files=files) != checkpoint_digest(directory, files=files[:1])


@pytest.mark.parametrize(
    ("path", "name", "revision"),
    [
        ("models/Qwen2-0.5B", "Qwen2-0.5B", ""),
        ("hub/models--Qwen--Qwen2-0.5B/snapshots/abc123", "Qwen/Qwen2-0.5B", "abc123"),
    ],
)
def test_a_model_is_named_by_its_repository_or_its_directory(
    tmp_path: Path, path: str, name: str, revision: str
) -> None:
    (tmp_path / path).mkdir(parents=True)
    assert checkpoint.checkpoint_name(tmp_path / path) == (name, revision)
