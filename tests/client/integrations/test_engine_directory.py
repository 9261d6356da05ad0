"""Which files an engine's load formats read."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.checkpoints import write_file, write_shards
from weight_broker.integrations.checkpoint import CheckpointError
from weight_broker.integrations.engine.directory import files_read, local_directory
from weight_broker.integrations.engine.engine import NotServable


def filled(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).write_bytes(b"")
    return directory


@pytest.mark.parametrize(
    ("load_format", "present", "read"),
    [
        ("auto", ["model.safetensors", "value_head.safetensors"], ["model.safetensors", "value_head.safetensors"]),
        ("auto", ["pytorch_model.bin", "training_args.bin", "optimizer.pt"], ["pytorch_model.bin"]),
        ("auto", ["adapter.safetensors", "pytorch_model.bin"], ["adapter.safetensors"]),
        ("auto", ["weights.pt", "scheduler.pt"], ["weights.pt"]),
        ("pt", ["model.safetensors", "weights.pt"], ["weights.pt"]),
        ("npcache", ["model.safetensors", "pytorch_model.bin"], ["pytorch_model.bin"]),
        ("mistral", ["model.safetensors", "consolidated.safetensors"], ["consolidated.safetensors"]),
    ],
)
def test_a_load_format_reads_its_files(tmp_path: Path, load_format: str, present: list[str], read: list[str]) -> None:
    assert [file.name for file in files_read(filled(tmp_path, *present), load_format)] == read


def test_what_is_beside_an_index_is_read_by_some_versions_only(tmp_path: Path) -> None:
    directory = write_shards(tmp_path / "model", {"a.safetensors": {"one": b"1"}, "b.safetensors": {"two": b"2"}})
    write_file(directory / "value_head.safetensors", {"v_head": b"3"})
    assert [file.name for file in files_read(directory)] == ["a.safetensors", "b.safetensors"]
    write_file(directory / "consolidated.safetensors", {"wq": b"3"})
    write_file(directory / "mtp.safetensors", {"mtp": b"4"})
    assert [file.name for file in files_read(directory)] == [
        "a.safetensors",
        "b.safetensors",
        "consolidated.safetensors",
        "mtp.safetensors",
    ]
    assert [file.name for file in files_read(directory, "safetensors")] == ["a.safetensors", "b.safetensors"]


def test_a_format_without_files_has_no_key(tmp_path: Path) -> None:
    filled(tmp_path, "model.safetensors")
    with pytest.raises(NotServable, match="'dummy' reads no weights"):
        files_read(tmp_path, "dummy")
    with pytest.raises(CheckpointError, match=r"no \*\.pt file"):
        files_read(tmp_path, "pt")


def test_a_single_file_is_no_directory(tmp_path: Path) -> None:
    assert local_directory(str(tmp_path), None, None) == tmp_path
    filled(tmp_path, "model.gguf")
    with pytest.raises(NotServable, match="single file"):
        local_directory(str(tmp_path / "model.gguf"), None, None)
