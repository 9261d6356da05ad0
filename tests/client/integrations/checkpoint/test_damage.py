"""A damaged file in the cache of the hub is found, and named."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from weight_broker.integrations.checkpoint import DamageCheck, cache, damage

CONTENT = bytes(range(256)) * 1024


@pytest.fixture(autouse=True)
def cache_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache for this test alone, on a file system that remembers."""
    path = tmp_path / "cache" / "digests.json"
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(path))
    monkeypatch.setattr(cache, "_SETTLED_NANOSECONDS", 0)
    monkeypatch.setattr(cache, "superblock_of", lambda file: "mounted since boot")
    return path


def blob(directory: Path, content: bytes, sha256: str = "") -> Path:
    """A file of a snapshot, kept under a SHA-256."""
    blobs = directory / "models--acme--tiny/blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    kept = blobs / (sha256 or hashlib.sha256(content).hexdigest())
    kept.write_bytes(content)
    link = directory / f"{len(list(directory.iterdir()))}.safetensors"
    link.symlink_to(kept)
    return link


def compared(*files: Path) -> str:
    check = DamageCheck(files)
    check.start()
    found = check.damage()
    assert check.has_ended
    return found


def test_whole_files_are_whole(tmp_path: Path) -> None:
    assert compared(blob(tmp_path / "a", CONTENT), blob(tmp_path / "b", CONTENT[1:])) == ""


def test_a_flipped_bit_is_found_and_the_file_is_named(tmp_path: Path) -> None:
    damaged = bytearray(CONTENT)
    damaged[70_000] ^= 4
    whole, bad = (
        blob(tmp_path / "a", CONTENT),
        blob(tmp_path / "b", bytes(damaged), hashlib.sha256(CONTENT).hexdigest()),
    )
    assert str(bad) in compared(whole, bad)


def test_a_file_that_cannot_be_read_is_not_taken_for_whole(tmp_path: Path) -> None:
    file = blob(tmp_path / "a", CONTENT)
    check = DamageCheck([file])
    file.resolve().unlink()
    check.start()
    assert "cannot be compared" in check.damage()


def test_files_that_the_hub_does_not_know_are_not_compared(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(CONTENT)
    assert compared(tmp_path / "model.safetensors", tmp_path / "absent.safetensors") == ""


def test_a_whole_file_is_not_read_again_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = blob(tmp_path / "a", CONTENT)
    assert compared(file) == ""
    with monkeypatch.context() as patched:
        patched.setattr(DamageCheck, "_sha256", lambda self, file: pytest.fail("the file was read again"))
        assert compared(file) == ""
    file.resolve().write_bytes(CONTENT[:-1] + b"x")
    assert "is damaged" in compared(file)


def test_a_damaged_file_is_not_remembered(tmp_path: Path) -> None:
    file = blob(tmp_path / "a", CONTENT[1:], hashlib.sha256(CONTENT).hexdigest())
    assert "is damaged" in compared(file)
    assert "is damaged" in compared(file)


def test_a_comparison_that_is_not_needed_any_more_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = blob(tmp_path / "a", CONTENT)
    begun, go_on = threading.Event(), threading.Event()
    compare = DamageCheck._sha256

    def held(self: DamageCheck, file: Path) -> str:
        begun.set()
        go_on.wait(60)
        return compare(self, file)

    monkeypatch.setattr(damage.DamageCheck, "_sha256", held)
    check = DamageCheck([file])
    check.start()
    assert begun.wait(60)
    assert not check.has_ended
    check.stop()
    go_on.set()
    assert check.damage() == ""
