"""The name and the revision of the model in a directory."""

from __future__ import annotations

import os
import re
from pathlib import Path

_HUB_SNAPSHOT = re.compile(r"/models--(?P<repository>[^/]+)/snapshots/(?P<revision>[^/]+)(?P<folder>/.+)?$")


def checkpoint_name(model_dir: str | os.PathLike[str]) -> tuple[str, str]:
    """Name and revision of the model in `model_dir`: the repository's and the commit for a snapshot in the hub's cache,
    also through links; else the directory's name and none. Bytes that are not UTF-8 are written as `\\xe8`."""
    path = Path(model_dir).absolute()
    resolved = path.resolve()
    # The cache may itself be a link to a directory with another name.
    snapshot = _HUB_SNAPSHOT.search(str(resolved)) or _HUB_SNAPSHOT.search(str(path))
    if snapshot is None:
        return _text(resolved.name or str(path)), ""
    owner, separator, name = snapshot["repository"].partition("--")
    repository = f"{owner}/{name}" if separator and owner and name else snapshot["repository"]
    return _text(repository + (snapshot["folder"] or "")), _text(snapshot["revision"])


def _text(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")
