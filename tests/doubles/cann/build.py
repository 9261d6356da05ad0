"""Compiles the double with gcc, once for each state of its sources."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

from doubles.compiling import CannotBuild, compile_library, compiled

__all__ = ["LIBRARY", "Built", "CannotBuild", "build"]

SOURCES = Path(__file__).parent
LIBRARY = "libascendcl.so"
ALIASES = ("libhccl.so", "libruntime.so", "libhccl_plf.so", "libra.so")
"""The other libraries of CANN that the datasystem's plugin names. The loader sees that they are one file."""


class Built(NamedTuple):
    """What a process needs to run on the double."""

    libraries: Path
    """The directory for LD_LIBRARY_PATH."""
    preload: Path
    """The library for LD_PRELOAD."""


RELEASES = ("8.3", "8.5", "9.0", "9.1")
"""The releases of CANN whose functions and rules the double can have."""


@cache
def build(release: str = "8.5") -> Built:
    """Compiles the double of a release of CANN, or finds it compiled. Raises CannotBuild."""
    number = f"-DCANN_RELEASE={release.replace('.', '')}0"

    def fill(directory: Path) -> None:
        compile_library(sorted(SOURCES.glob("*.c")), directory / LIBRARY, number)
        compile_library(sorted((SOURCES / "preload").glob("*.c")), directory / "preload.so")
        for alias in ALIASES:
            (directory / alias).symlink_to(LIBRARY)

    finished = compiled(f"CANN-{release}", SOURCES, fill)
    return Built(libraries=finished, preload=finished / "preload.so")


if __name__ == "__main__":
    libraries, preload = build()
    sys.stdout.write(f"LD_LIBRARY_PATH={libraries}\nLD_PRELOAD={preload}\n")
