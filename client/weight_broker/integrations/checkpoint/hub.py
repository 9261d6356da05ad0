"""What the hub's cache knows about a file: it keeps large files under their SHA-256, and snapshots link to them."""

from __future__ import annotations

import os
import re
from pathlib import Path

_SHA256 = re.compile(r"[0-9a-f]{64}")


def known_sha256(file: Path) -> str:
    """The SHA-256 that the file was downloaded with; empty if it is not in the hub's cache."""
    blob = Path(os.path.realpath(file))
    is_blob = blob.parent.name == "blobs" and "--" in blob.parent.parent.name
    return blob.name if is_blob and _SHA256.fullmatch(blob.name) else ""
