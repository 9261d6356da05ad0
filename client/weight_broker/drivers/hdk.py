"""Which Ascend drivers can share memory between processes. Older ones fail in ways that do not name the cause."""

from __future__ import annotations

import re
from pathlib import Path

VERSION_FILE = Path("/usr/local/Ascend/driver/version.info")
SHARING_FLOOR = "25.0.rc1"
"""Sharing of device memory between processes."""
CHUNK_SHARING_FLOOR = "25.3.rc1"
"""Importing chunks more than once: below, every import but the first is broken."""

_RELEASED = 1 << 16
_FORM = re.compile(r"(\d+)\.(\d+)\.(?:rc(\d+)|(\d+))", re.IGNORECASE)


def installed_version(version_file: Path = VERSION_FILE) -> str | None:
    """The driver's version, for example "25.3.rc1"; None where that cannot be seen, as in most containers."""
    try:
        text = version_file.read_text(errors="replace")
    except OSError:
        return None
    found = re.search(r"^\s*Version\s*=\s*(\S+)", text, re.MULTILINE | re.IGNORECASE)
    return found[1] if found else None


def is_below(version: str, floor: str) -> bool:
    """Whether `version` is older than `floor`; a release candidate comes before its release. False for a version that
    does not look like one: the driver itself will say what it cannot do."""
    have, need = _parse(version), _parse(floor)
    return have is not None and need is not None and have < need


def _parse(version: str) -> tuple[int, int, int] | None:
    found = _FORM.match(version.strip())
    if found is None:
        return None
    major, minor, candidate, patch = found.groups()
    return int(major), int(minor), int(candidate) if candidate else _RELEASED + int(patch)
