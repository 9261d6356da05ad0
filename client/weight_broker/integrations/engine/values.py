"""Configuration as it goes into keys."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version


def digest(value: object) -> str:
    """A short digest of anything that a configuration may hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def installed_version(distribution: str) -> str:
    """Empty if it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""
