"""What is asked of NVIDIA's driver is what its header declares: functions, their arguments, and the numbers.

The header is taken from the path in CUDA_HEADER (a `cuda.h`), else from a wheel that has it, which is downloaded
(4 MB): only the slow tests do that.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from weight_broker.drivers import cuda

WHEEL = "nvidia-cuda-runtime-cu12==12.9.79"
MEMBER = "nvidia/cuda_runtime/include/cuda.h"
NUMBERS = {
    "CU_IPC_HANDLE_SIZE": cuda.HANDLE_BYTES,
    "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED": cuda.PEER_ACCESS_ALREADY_ENABLED,
    "CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS": cuda.IPC_LAZY_PEER_ACCESS,
    "CU_STREAM_NON_BLOCKING": cuda.STREAM_NON_BLOCKING,
    "CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE": cuda.IS_IPC_CAPABLE,
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its text, without comments."""
    path = os.environ.get("CUDA_HEADER")
    if path is not None:
        text = Path(path).read_text()
    else:
        directory = tmp_path_factory.mktemp("cuda-runtime")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL]
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=150)
        if done.returncode:
            pytest.skip(f"{WHEEL} cannot be downloaded: {done.stderr.strip().splitlines()[-1:]}")
        (wheel,) = directory.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            text = archive.read(MEMBER).decode()
    return re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("name", sorted(cuda.ARGUMENTS))
def test_a_function_is_declared_with_as_many_arguments_of_the_same_kinds(header: str, name: str) -> None:
    plain = name.removesuffix("_v2")
    if name != plain:  # the header lets the plain name mean this one
        assert re.search(rf"#\s*define {plain}\s+(?:__CUDA_API_PT[DS]Z?\()?{name}\b|\b{name}\(", header)
    (arguments, *_) = re.findall(rf"CUresult CUDAAPI {plain}\(([^)]*)\)", header) or re.findall(
        rf"CUresult CUDAAPI {name}\(([^)]*)\)", header
    )
    declared = [] if arguments.strip() == "void" else [_kind(one) for one in arguments.split(",")]
    assert declared == [_size(one) for one in cuda.ARGUMENTS[name]]


@pytest.mark.parametrize("name", sorted(NUMBERS))
def test_a_number_is_the_headers(header: str, name: str) -> None:
    found = re.search(rf"\b{name}\s*=?\s*(0x[0-9a-fA-F]+|\d+)", header)
    assert found is not None
    assert int(found[1], 0) == NUMBERS[name]


def _kind(argument: str) -> str:
    """How an argument is passed."""
    if "*" in argument:
        return "8 bytes"
    kind = argument.split()[0] if argument.split()[0] != "const" else argument.split()[1]
    return {
        "CUdeviceptr": "8 bytes",
        "CUcontext": "8 bytes",
        "CUstream": "8 bytes",
        "size_t": "8 bytes",
        "CUipcMemHandle": "64 bytes",
    }.get(kind, "4 bytes")


def _size(type_: type[ctypes.Structure]) -> str:
    return f"{ctypes.sizeof(type_)} bytes"
