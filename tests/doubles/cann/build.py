"""Compiles the double with gcc, once for each state of its sources."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).parent
LIBRARY = "libascendcl.so"
ALIASES = ("libhccl.so", "libruntime.so", "libhccl_plf.so", "libra.so")
"""The other libraries of CANN that the datasystem's plugin names. The loader sees that they are one file."""
FLAGS = ("-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-fPIC", "-fvisibility=hidden", "-shared")


class Built(NamedTuple):
    """What a process needs to run on the double."""

    libraries: Path
    """The directory for LD_LIBRARY_PATH."""
    preload: Path
    """The library for LD_PRELOAD."""


class CannotBuild(Exception):
    """There is no compiler, or it refuses the sources. The text says which, with the compiler's words."""


@cache
def build() -> Built:
    """Compiles the double, or finds it compiled. Raises CannotBuild."""
    compiler = os.environ.get("CC", "gcc")
    if shutil.which(compiler) is None:
        raise CannotBuild(f"the CANN double needs a C compiler: there is no {compiler!r}")
    cache_directory = Path(tempfile.gettempdir()) / f"weight-broker-cann-double-{os.getuid()}"
    cache_directory.mkdir(mode=0o700, exist_ok=True)
    if cache_directory.stat().st_uid != os.getuid():
        raise CannotBuild(f"{cache_directory} belongs to another user")
    finished = cache_directory / _fingerprint(compiler)
    if not finished.exists():
        fresh = Path(tempfile.mkdtemp(dir=cache_directory))
        _compile(compiler, sorted(SOURCES.glob("*.c")), fresh / LIBRARY)
        _compile(compiler, sorted((SOURCES / "preload").glob("*.c")), fresh / "preload.so")
        for alias in ALIASES:
            (fresh / alias).symlink_to(LIBRARY)
        try:
            fresh.rename(finished)
        except OSError:  # another process was faster
            shutil.rmtree(fresh)
    return Built(libraries=finished, preload=finished / "preload.so")


def _fingerprint(compiler: str) -> str:
    digest = hashlib.sha256(repr((compiler, FLAGS)).encode())
    for path in sorted(SOURCES.rglob("*.[ch]")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:20]


def _compile(compiler: str, sources: list[Path], library: Path) -> None:
    names = [str(path) for path in sources]
    command = [compiler, *FLAGS, f"-Wl,-soname,{library.name}", "-o", str(library), *names, "-lpthread", "-ldl"]
    outcome = subprocess.run(command, capture_output=True, text=True)
    if outcome.returncode:
        shutil.rmtree(library.parent)
        raise CannotBuild(outcome.stderr)


if __name__ == "__main__":
    libraries, preload = build()
    sys.stdout.write(f"LD_LIBRARY_PATH={libraries}\nLD_PRELOAD={preload}\n")
