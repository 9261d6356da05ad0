"""Paths for libraries that open none that is not UTF-8, as safetensors and torch do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def utf8_path(directory: Path) -> Iterator[Path]:
    """The directory itself, or a path to it for the length of the block."""
    try:
        str(directory).encode()
    except UnicodeEncodeError:
        descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield Path(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
    else:
        yield directory
