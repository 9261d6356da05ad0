"""Libraries of CANN that have names and nothing else, for what looks for names."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

RELEASE_8_3: Mapping[str, Iterable[str]] = {"libra.so": ("ra_init",), "libhccl_plf.so": ("hrtGetDevicePhyIdByIndex",)}
RELEASE_8_5: Mapping[str, Iterable[str]] = {
    "libra.so": ("RaInit",),
    "libhccl_plf.so": ("hrtGetDevicePhyIdByIndex", "hrtGetDeviceRefresh"),
}


def compile_libraries(directory: Path, functions: Mapping[str, Iterable[str]]) -> Path:
    """One library for each entry. Skips the test where there is no compiler."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    for library, names in functions.items():
        source = directory / f"{library}.c"
        source.write_text("".join(f"int {name}(void) {{ return 1; }}\n" for name in names))
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", directory / library, source], check=True, timeout=60)
    return directory
