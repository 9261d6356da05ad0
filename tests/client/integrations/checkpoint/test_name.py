"""The name of a model, by the directory that it is in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from weight_broker.integrations.checkpoint import checkpoint_name
from weight_broker.key import WeightSetKey

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("path", "name", "revision"),
    [
        ("models/Qwen2-0.5B", "Qwen2-0.5B", ""),
        ("hub/models--Qwen--Qwen2-0.5B/snapshots/abc123", "Qwen/Qwen2-0.5B", "abc123"),
        (f"hub/models--gpt2/snapshots/{REVISION}", "gpt2", REVISION),
        (f"hub/models--acme--tiny/snapshots/{REVISION}/text/", "acme/tiny/text", REVISION),
        (f"models--acme--tiny/copies/{REVISION}", REVISION, ""),
        ("models/模型", "模型", ""),
    ],
)
def test_a_model_is_named_by_its_repository_or_its_directory(
    tmp_path: Path, path: str, name: str, revision: str
) -> None:
    (tmp_path / path).mkdir(parents=True)
    assert checkpoint_name(f"{tmp_path}/{path}") == (name, revision)


def test_a_link_to_a_snapshot_has_the_name_of_the_snapshot(tmp_path: Path) -> None:
    snapshot = tmp_path / f"models--acme--tiny/snapshots/{REVISION}"
    snapshot.mkdir(parents=True)
    (tmp_path / "production").symlink_to(snapshot)
    assert checkpoint_name(tmp_path / "production") == checkpoint_name(snapshot) == ("acme/tiny", REVISION)


def test_a_repository_that_is_kept_elsewhere_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / f"disk/snapshots/{REVISION}").mkdir(parents=True)
    (tmp_path / "models--acme--tiny").symlink_to(tmp_path / "disk")
    assert checkpoint_name(tmp_path / f"models--acme--tiny/snapshots/{REVISION}") == ("acme/tiny", REVISION)


def test_a_name_that_is_not_utf_8_can_stand_in_a_key(tmp_path: Path) -> None:
    directory = tmp_path / os.fsdecode(b"mod\xe8le")
    directory.mkdir()
    name, _ = checkpoint_name(directory)
    assert name == "mod\\xe8le"
    assert WeightSetKey(name).id
