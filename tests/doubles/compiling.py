"""Compiles doubles with gcc, once for each state of their sources."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

FLAGS = ("-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-fPIC", "-fvisibility=hidden", "-shared")


class CannotBuild(Exception):
    """There is no compiler, or it refuses the sources. The text says which, with the compiler's words."""


def compiled(name: str, sources: Path, fill: Callable[[Path], None]) -> Path:
    """The directory that `fill` has filled from what is in `sources`, now or earlier. Raises CannotBuild."""
    if shutil.which(_compiler()) is None:
        raise CannotBuild(f"the {name} double needs a C compiler: there is no {_compiler()!r}")
    cache_directory = Path(tempfile.gettempdir()) / f"weight-broker-{name.lower()}-double-{os.getuid()}"
    cache_directory.mkdir(mode=0o700, exist_ok=True)
    if cache_directory.stat().st_uid != os.getuid():
        raise CannotBuild(f"{cache_directory} belongs to another user")
    finished = cache_directory / _fingerprint(sources)
    if not finished.exists():
        fresh = Path(tempfile.mkdtemp(dir=cache_directory))
        try:
            fill(fresh)
        except BaseException:
            shutil.rmtree(fresh)
            raise
        try:
            fresh.rename(finished)
        except OSError:  # another process was faster
            shutil.rmtree(fresh)
    return finished


def compile_library(sources: Sequence[Path], library: Path, *flags: str) -> None:
    """One shared library. Raises CannotBuild."""
    names = [str(path) for path in sources]
    command = [
        _compiler(),
        *FLAGS,
        *flags,
        f"-Wl,-soname,{library.name}",
        "-o",
        str(library),
        *names,
        "-lpthread",
        "-ldl",
    ]
    outcome = subprocess.run(command, capture_output=True, text=True)
    if outcome.returncode:
        raise CannotBuild(outcome.stderr)


def _compiler() -> str:
    return os.environ.get("CC", "gcc")


def _fingerprint(sources: Path) -> str:
    digest = hashlib.sha256(repr((_compiler(), FLAGS)).encode())
    for path in sorted(sources.rglob("*.[ch]")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:20]
