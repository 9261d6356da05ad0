"""Compiles the double with gcc, once for each state of its sources."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from doubles.compiling import compile_library, compiled

SOURCES = Path(__file__).parent
LIBRARY = "libcuda.so.1"


@cache
def build() -> Path:
    """The directory for LD_LIBRARY_PATH. Raises CannotBuild."""
    return compiled(
        "CUDA", SOURCES, lambda directory: compile_library(sorted(SOURCES.glob("*.c")), directory / LIBRARY)
    )
