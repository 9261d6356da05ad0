"""What the cache of digests remembers, and what it does not believe."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from support.checkpoints import write_checkpoint
from weight_broker.integrations.checkpoint import cache, checkpoint_digest, digest

pytestmark = pytest.mark.usefixtures("settled")

FORGED = "sampled-sha256:" + "0" * 32


@pytest.fixture(autouse=True)
def cache_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache for this test alone."""
    path = tmp_path / "cache" / "digests.json"
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(path))
    return path


def settle() -> None:
    """Waits until what was written before counts as settled."""
    time.sleep(0.03)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes files count as settled soon after they were written, on a file system that remembers."""
    monkeypatch.setattr(cache, "_SETTLED_NANOSECONDS", 10_000_000)
    monkeypatch.setattr(cache, "superblock_of", lambda file: "mounted since boot")


def test_an_unchanged_checkpoint_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_checkpoint(tmp_path / "base")
    settle()
    first = checkpoint_digest(directory)
    monkeypatch.setattr(digest, "_compute", lambda *_: pytest.fail("the files were read again"))
    assert checkpoint_digest(directory) == first


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


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 100_000,
        b'{"form":2}',
        b'{"form":2,"digests":[]}',
        b'{"form":2,"digests":{"x":7}}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_cache_is_ignored_and_replaced(tmp_path: Path, cache_file: Path, damage: bytes) -> None:
    directory = write_checkpoint(tmp_path / "base")
    settle()
    expected = checkpoint_digest(directory, cache=False)
    cache_file.parent.mkdir()
    cache_file.write_bytes(damage)
    assert checkpoint_digest(directory) == expected
    assert expected in cache_file.read_text()


def test_a_cache_that_others_can_write_is_not_believed(tmp_path: Path, cache_file: Path) -> None:
    directory = write_checkpoint(tmp_path / "base")
    settle()
    expected = checkpoint_digest(directory)
    cache_file.write_text(cache_file.read_text().replace(expected, FORGED))
    assert checkpoint_digest(directory) == FORGED  # the user's own file is believed
    cache_file.chmod(0o622)
    assert checkpoint_digest(directory) == expected


def test_the_cache_can_be_turned_off(tmp_path: Path, cache_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_checkpoint(tmp_path / "base")
    settle()
    checkpoint_digest(directory, cache=False)
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, "off")
    checkpoint_digest(directory)
    assert not cache_file.exists()


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path, cache_file: Path) -> None:
    directory = write_checkpoint(tmp_path / "base")
    settle()
    cache_file.parent.write_text("a file where the directory should be")
    assert checkpoint_digest(directory) == checkpoint_digest(directory, cache=False)


def test_writers_at_the_same_time_leave_a_whole_file(tmp_path: Path) -> None:
    store = cache.CheckpointCache(tmp_path / "shared.json")

    def write(number: int) -> None:
        for index in range(20):
            store.put(f"{number}-{index}", FORGED)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if store.path is not None and store.path.exists():
            assert json.loads(store.path.read_text())["form"] == 2
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["shared.json"]


def test_the_cache_keeps_the_newest_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MAX_ENTRIES", 3)
    store = cache.CheckpointCache(tmp_path / "shared.json")
    for number in range(5):
        monkeypatch.setattr(time, "time", lambda number=number: 1000.0 + number)
        store.put(f"signature{number}", FORGED)
    assert [store.get(f"signature{number}") for number in range(5)] == [None, None, FORGED, FORGED, FORGED]


@pytest.mark.parametrize("make", ["directory", "unreadable", "link to a device", "pipe", "link to nothing"])
def test_a_path_that_is_no_file_is_ignored_and_left(tmp_path: Path, cache_file: Path, make: str) -> None:
    directory = write_checkpoint(tmp_path / "base")
    settle()
    cache_file.parent.mkdir()
    if make == "directory":
        cache_file.mkdir()
    elif make == "unreadable":
        cache_file.write_text("{}")
        cache_file.chmod(0)
    elif make == "pipe":
        os.mkfifo(cache_file)
    else:
        cache_file.symlink_to("/dev/null" if make == "link to a device" else tmp_path / "absent")
    before = os.lstat(cache_file).st_mode
    assert checkpoint_digest(directory) == checkpoint_digest(directory, cache=False)
    if make != "unreadable":
        assert os.lstat(cache_file).st_mode == before


def test_an_entry_that_is_no_digest_is_not_used(tmp_path: Path, cache_file: Path) -> None:
    directory = write_checkpoint(tmp_path / "base")
    settle()
    expected = checkpoint_digest(directory)
    cache_file.write_text(cache_file.read_text().replace(expected, "half a dig"))
    assert checkpoint_digest(directory) == expected


def test_nothing_is_remembered_of_a_file_system_whose_numbers_mean_nothing(
    tmp_path: Path, cache_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_checkpoint(tmp_path / "base")
    settle()
    monkeypatch.setattr(cache, "superblock_of", lambda file: None)
    checkpoint_digest(directory)
    assert not cache_file.exists()


def test_nothing_is_remembered_across_mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_checkpoint(tmp_path / "base")
    settle()
    checkpoint_digest(directory)
    monkeypatch.setattr(cache, "superblock_of", lambda file: "mounted since then")
    monkeypatch.setattr(digest, "_compute", lambda *_, **options: FORGED)  # computed, not remembered
    assert checkpoint_digest(directory) == FORGED
