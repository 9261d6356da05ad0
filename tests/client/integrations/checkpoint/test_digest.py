"""The checkpoint digest: what changes it, what does not, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from support.checkpoints import TENSORS, with_byte, write_checkpoint, write_file, write_shards
from weight_broker.integrations import checkpoint
from weight_broker.integrations.checkpoint import CheckpointError, cache, checkpoint_digest
from weight_broker.integrations.checkpoint.sample import BLOCK_BYTES as BLOCK


@pytest.fixture(autouse=True)
def cache_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache for this test alone."""
    path = tmp_path / "cache" / "digests.json"
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(path))
    return path


def matrix(rows: int) -> bytes:
    """Content of rows of 1 KiB."""
    return b"".join(row.to_bytes(4, "little") * 256 for row in range(rows))


@pytest.mark.parametrize("position", [0, BLOCK - 1, -BLOCK, -1])
def test_a_fine_tune_of_the_same_shape_has_another_digest(tmp_path: Path, position: int) -> None:
    content = matrix(5000)
    base = write_checkpoint(tmp_path / "base", {"large": content})
    tuned = write_checkpoint(tmp_path / "tuned", {"large": with_byte(content, position)})
    assert checkpoint_digest(base) != checkpoint_digest(tuned)


@pytest.mark.parametrize(
    ("name", "rows", "settings"),
    [
        ("model.embed_tokens.weight", 5000, {}),
        ("transformer.wte.weight", 5000, {}),
        ("lm_head.weight", 5000, {}),
        ("odd_name", 5000, {"vocab_size": 5000}),
        ("odd_name", 5000, {"text_config": {"vocab_size": 5000}}),
        ("model.layers.0.input_layernorm.weight", 100, {}),
        ("model.layers.0.mlp.up_proj.bias", 1024, {}),
    ],
)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.77])
def test_one_changed_row_of_an_embedding_or_a_norm_is_seen(
    tmp_path: Path, name: str, rows: int, settings: dict[str, object], share: float
) -> None:
    content, shapes = matrix(rows), {name: [rows, 1024]}
    base = write_checkpoint(tmp_path / "base", {name: content}, shapes=shapes, **settings)
    tuned = {name: with_byte(content, int(rows * share) * 1024 + 512)}
    other = write_checkpoint(tmp_path / "tuned", tuned, shapes=shapes, **settings)
    assert checkpoint_digest(base) != checkpoint_digest(other)


def test_one_changed_expert_of_a_stack_is_seen(tmp_path: Path) -> None:
    experts, expert_bytes = 16, 128 << 10
    content, shapes = matrix(experts * expert_bytes // 1024), {"experts": [experts, 128, 1024]}
    base = checkpoint_digest(write_checkpoint(tmp_path / "base", {"experts": content}, shapes=shapes))
    for expert in (1, 7, 14):
        begin = expert * expert_bytes
        tuned = content[:begin] + b"\x7f" * expert_bytes + content[begin + expert_bytes :]
        other = write_checkpoint(tmp_path / f"expert{expert}", {"experts": tuned}, shapes=shapes)
        assert checkpoint_digest(other) != base


def test_every_byte_of_a_small_tensor_counts(tmp_path: Path) -> None:
    content = bytes(2 * BLOCK)
    base = checkpoint_digest(write_checkpoint(tmp_path / "base", {"one": content}))
    for position in (0, BLOCK - 1, BLOCK, 2 * BLOCK - 1):
        other = write_checkpoint(tmp_path / f"at{position}", {"one": with_byte(content, position)})
        assert checkpoint_digest(other) != base


def test_only_the_full_digest_sees_a_single_byte_within_a_large_matrix(tmp_path: Path) -> None:
    content = matrix(5000)
    base = write_checkpoint(tmp_path / "base", {"large": content})
    edited = write_checkpoint(tmp_path / "edited", {"large": with_byte(content, 2 * BLOCK)})
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
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors file and no pytorch_model\.bin"):
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


def torch_checkpoint(directory: Path, row: float, *, stray: bool = False) -> Path:
    """Weights in the format of torch.save; only a row within a matrix differs."""
    directory.mkdir()
    weights = {"up_proj": torch.zeros(3000, 512), "norm": torch.ones(512)}
    weights["up_proj"][1234] = row
    torch.save(weights, directory / "pytorch_model.bin")
    if stray:
        write_file(directory / "value_head.safetensors", {"v_head.summary.weight": b"the same"})
    return directory


def test_the_digest_is_of_the_file_that_is_read_and_not_of_another_beside_it(tmp_path: Path) -> None:
    first, second = (torch_checkpoint(tmp_path / f"run{run}", run, stray=True) for run in (1, 2))
    assert checkpoint_digest(first) != checkpoint_digest(second)
    (second / "value_head.safetensors").unlink()
    (second / "pytorch_model.bin").write_bytes((first / "pytorch_model.bin").read_bytes())
    assert checkpoint_digest(first) == checkpoint_digest(second)


def test_a_row_within_a_matrix_that_torch_saved_is_seen(tmp_path: Path) -> None:
    """torch.save writes the CRC-32 of every byte."""
    assert checkpoint_digest(torch_checkpoint(tmp_path / "a", 1)) != checkpoint_digest(
        torch_checkpoint(tmp_path / "b", 2)
    )


def test_the_name_that_torch_saved_under_does_not_count(tmp_path: Path) -> None:
    saved = torch_checkpoint(tmp_path / "saved", 1)
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    torch.save(torch.load(saved / "pytorch_model.bin"), renamed / "epoch3.bin")
    (renamed / "epoch3.bin").rename(renamed / "pytorch_model.bin")
    assert checkpoint_digest(saved) == checkpoint_digest(renamed)


def test_damage_of_a_file_that_torch_saved_is_named(tmp_path: Path) -> None:
    directory = torch_checkpoint(tmp_path / "model", 1)
    file = directory / "pytorch_model.bin"
    for content in (b"", b"\x80\x02 a pickle", file.read_bytes()[:-100]):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is not a zip file"):
            checkpoint_digest(directory)


def hub_checkpoint(cache_directory: Path, sha256: str, tensors: dict[str, bytes]) -> Path:
    """A snapshot in the hub's cache whose weights have this name there."""
    repository = cache_directory / "models--acme--tiny"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    write_file(repository / "blobs" / sha256, tensors)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{sha256}")
    return snapshot


def test_the_digest_covers_the_names_that_the_hub_keeps_files_under(tmp_path: Path) -> None:
    """They are the SHA-256 of every byte: what no sample sees makes a difference."""
    content = matrix(5000)
    first, second = (hub_checkpoint(tmp_path / name, name * 64, {"large": content}) for name in "ab")
    assert checkpoint_digest(first).startswith("hub-sha256:")
    assert checkpoint_digest(first) != checkpoint_digest(second)
    (tmp_path / "link").symlink_to(first)
    assert checkpoint_digest(tmp_path / "link") == checkpoint_digest(first)
    assert checkpoint_digest(first, full=True) == checkpoint_digest(second, full=True)


def test_a_file_that_was_written_over_in_the_cache_of_the_hub_is_seen(tmp_path: Path) -> None:
    content = matrix(5000)
    before, after = (
        checkpoint_digest(hub_checkpoint(tmp_path / str(place), "c" * 64, {"large": with_byte(content, place)}))
        for place in (0, 1)
    )
    assert before != after
