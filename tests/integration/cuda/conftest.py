"""Fixtures: an emulated host with GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from doubles.compiling import CannotBuild
from doubles.cuda.build import build
from doubles.cuda.control import CudaHost
from support.gpu_host import GpuHost


@pytest.fixture
def gpu_host(tmp_path: Path) -> Iterator[GpuHost]:
    """A host with 4 GPUs whose broker and instances the test starts."""
    try:
        build()
    except CannotBuild as error:
        if "needs a C compiler" in str(error):
            pytest.skip(str(error))
        raise
    cuda = CudaHost()
    host = GpuHost(cuda, tmp_path)
    try:
        yield host
    finally:
        host.close()
        cuda.close()
