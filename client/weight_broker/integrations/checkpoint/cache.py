"""A small per-user file that remembers the digests of checkpoints whose files have not changed.

A file counts as unchanged while device, inode, size, modification time and change time are what they were, on a file
system where these mean something and until it is unmounted (`superblock_of`). The cache is only a short cut: a path
that is no file, a file that is damaged, belongs to another user or cannot be read or written is ignored. Writers
replace the file as a whole, so that a reader never sees half of it; of two concurrent writes one may be lost, which
costs a computation. `WEIGHT_BROKER_CHECKPOINT_CACHE=off` turns the cache off, a path in that variable moves it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from weight_broker.integrations.checkpoint.superblock import superblock_of

ENVIRONMENT_VARIABLE = "WEIGHT_BROKER_CHECKPOINT_CACHE"
MAX_ENTRIES = 512
_MAX_FILE_BYTES = 1 << 20
_FORM = 2
_DIGEST = re.compile(r"[a-z0-9]+-sha256:[0-9a-f]{32}")
# A file that changed less than this ago could change again without its times showing it: they advance in ticks.
_SETTLED_NANOSECONDS = 2_000_000_000


def cache_directory() -> Path:
    """Where this user's caches of the weight broker are: `$XDG_CACHE_HOME/weight-broker`, else in `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "weight-broker"


@dataclass(frozen=True)
class CheckpointCache:
    """The cache in `path`; with None, a cache that stores nothing."""

    path: Path | None

    @classmethod
    def of_user(cls) -> CheckpointCache:
        """The cache that the environment asks for."""
        setting = os.environ.get(ENVIRONMENT_VARIABLE, "")
        if setting.lower() in {"off", "0", "no", "false"}:
            return cls(None)
        if setting:
            return cls(Path(setting))
        try:
            return cls(cache_directory() / "checkpoint-digests.json")
        except RuntimeError:  # no home directory
            return cls(None)

    def signature(self, files: Sequence[Path], kind: str) -> str | None:
        """Changes whenever one of `files` does; None if the file system cannot say so, or one of them changed too
        recently to be sure."""
        rows, now = [], time.time_ns()
        superblocks: dict[int, str | None] = {}
        for file in files:
            status = file.stat()
            if max(status.st_mtime_ns, status.st_ctime_ns) > now - _SETTLED_NANOSECONDS:
                return None
            if status.st_dev not in superblocks:
                superblocks[status.st_dev] = superblock_of(file)
            if superblocks[status.st_dev] is None:
                return None
            rows.append(
                (
                    file.name,
                    superblocks[status.st_dev],
                    status.st_dev,
                    status.st_ino,
                    status.st_size,
                    status.st_mtime_ns,
                    status.st_ctime_ns,
                )
            )
        return hashlib.sha256(json.dumps([kind, sorted(rows)]).encode()).hexdigest()

    def get(self, signature: str | None) -> str | None:
        """The digest remembered for `signature`."""
        if signature is None:
            return None
        entry = self._read().get(signature)
        return entry[0] if entry is not None else None

    def put(self, signature: str | None, digest: str) -> None:
        """Remembers `digest`; forgets the oldest entries above `MAX_ENTRIES`."""
        if signature is None or self.path is None or (os.path.lexists(self.path) and not os.path.isfile(self.path)):
            return
        entries = self._read()
        entries[signature] = (digest, int(time.time()))
        newest = sorted(entries.items(), key=lambda item: item[1][1], reverse=True)[:MAX_ENTRIES]
        text = json.dumps({"form": _FORM, "digests": dict(newest)}, separators=(",", ":"))
        # A cache that cannot be written (read-only home, full disk) costs time, nothing else.
        with suppress(OSError):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
            try:
                with os.fdopen(descriptor, "w", encoding="ascii") as stream:
                    stream.write(text)
                os.replace(temporary, self.path)
            except OSError:
                os.unlink(temporary)
                raise

    def _read(self) -> dict[str, tuple[str, int]]:
        if self.path is None:
            return {}
        try:
            content = json.loads(_trusted_text(self.path))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(content, dict) or content.get("form") != _FORM:
            return {}
        digests = content.get("digests")
        if not isinstance(digests, dict):
            return {}
        return {signature: (entry[0], entry[1]) for signature, entry in digests.items() if _is_entry(entry)}


def _trusted_text(path: Path) -> bytes:
    """Raises `OSError` or `ValueError`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        # A user who can write this file can make a wrong checkpoint look like the right one.
        trusted = status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if not trusted or not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is not a file that only this user can write")
        return os.read(descriptor, _MAX_FILE_BYTES)
    finally:
        os.close(descriptor)


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 2
        and isinstance(entry[0], str)
        and _DIGEST.fullmatch(entry[0]) is not None
        and isinstance(entry[1], int)
    )
