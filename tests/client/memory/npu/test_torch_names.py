"""What the device path asks of torch_npu is what torch_npu has: each name and number is looked up in the wheel's files.

The wheel is for machines with CANN and cannot be imported on others, but it can be read. It is taken from the path in
TORCH_NPU_WHEEL, else downloaded (44 MB), which only the slow tests do.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from weight_broker.memory.npu import torch as npu_torch

VERSION = "2.13.0"
LIBRARY = "torch_npu/lib/libtorch_npu.so"

NAMES = {
    "get_npu_format": ("torch_npu/utils/custom_ops.py", r"^torch_npu\.get_npu_format = "),
    "get_storage_size": ("torch_npu/utils/custom_ops.py", r"^torch_npu\.get_storage_size = "),
    "npu.memory_snapshot": ("torch_npu/npu/memory.py", r"^def memory_snapshot\(mempool_id=None\):"),
    "npu.synchronize": ("torch_npu/npu/utils.py", r"^def synchronize\(device=None\):"),
}
"""Every name that is used, and the line that defines it."""
SEGMENT_KEYS = {"address", "total_size", "device", "is_expandable", "segment_pool_id"}
"""Of what memory_snapshot() gives for a segment, what is read. The library has the names as texts of their own."""


def attributes_of_torch_npu(source: str) -> Iterator[str]:
    """Dotted names that are looked up in what `_torch_npu()` gives."""
    local = {"_torch_npu()", "torch_npu"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            base, _, name = ast.unparse(node).rpartition(".")
            root, _, rest = base.partition(".") if not base.startswith("_torch_npu()") else (base[:12], "", base[13:])
            if root in local:
                yield f"{rest}.{name}" if rest else name


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], bytes]]:
    """Reads a file of the wheel."""
    path = os.environ.get("TORCH_NPU_WHEEL")
    if path is None:
        directory = tmp_path_factory.mktemp("torch-npu")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"torch-npu=={VERSION}"]
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=150)
        if done.returncode:
            pytest.skip(f"torch-npu {VERSION} cannot be downloaded: {done.stderr.strip().splitlines()[-1:]}")
        (wheel,) = directory.glob("*.whl")
        path = str(wheel)
    with zipfile.ZipFile(Path(path)) as archive:
        yield archive.read


def test_the_names_that_are_used_are_those_that_are_looked_up_in_the_wheel() -> None:
    source = Path(npu_torch.__file__).read_text()
    used = set(attributes_of_torch_npu(source))
    assert {name for name in used if not any(other.startswith(f"{name}.") for other in used)} == set(NAMES)
    read_keys = set(re.findall(r'row(?:\.get\(|\[)"(\w+)"', source))
    assert read_keys == SEGMENT_KEYS


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_wheel_has_the_name(read: Callable[[str], bytes], name: str) -> None:
    file, definition = NAMES[name]
    assert re.search(definition, read(file).decode(), re.MULTILINE)


@pytest.mark.slow
def test_the_functions_are_reached_through_the_npu_package(read: Callable[[str], bytes]) -> None:
    package = ast.parse(read("torch_npu/npu/__init__.py").decode())
    imported = {
        (node.module, alias.name) for node in package.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert {("utils", "synchronize"), ("memory", "*")} <= imported
    memory = ast.parse(read("torch_npu/npu/memory.py").decode())
    (exported,) = [node.value for node in memory.body if isinstance(node, ast.Assign) and is_all(node)]
    assert "memory_snapshot" in ast.literal_eval(exported)


def is_all(node: ast.Assign) -> bool:
    return ast.unparse(node.targets[0]) == "__all__"


@pytest.mark.slow
def test_the_library_has_the_keys_of_a_segment(read: Callable[[str], bytes]) -> None:
    library = read(LIBRARY)
    assert {key for key in SEGMENT_KEYS if b"\0" + key.encode() + b"\0" in library} == SEGMENT_KEYS
    assert b"get_storage_size(Tensor" in library
    assert b"get_npu_format(Tensor" in library


@pytest.mark.slow
def test_the_formats_have_their_numbers(read: Callable[[str], bytes]) -> None:
    text = read("torch_npu/npu/_format.py").decode()
    numbers = {name: int(number) for name, number in re.findall(r"^    (\w+) = (-?\d+)$", text, re.MULTILINE)}
    for number, memory_format in npu_torch.FRACTAL_FORMATS.items():
        assert numbers[memory_format.name] == number
    assert numbers["ND"] == npu_torch.ND
    assert {numbers[name]: name for name in npu_torch.STRIDED_FORMATS.values()} == npu_torch.STRIDED_FORMATS


@pytest.mark.slow
def test_the_functions_of_acl_are_those_of_its_header(read: Callable[[str], bytes]) -> None:
    from weight_broker.drivers.acl import ARGUMENTS

    header = read("torch_npu/include/acl/acl_rt.h").decode() + read("torch_npu/include/acl/acl_base_rt.h").decode()
    header += read("torch_npu/include/acl/acl.h").decode()
    declared = dict(re.findall(r"ACL_FUNC_VISIBILITY[^;(]*?\b(acl\w+)\(([^)]*)\)", header))
    counts = {
        name: 0 if not (text := declared[name].strip()) or text == "void" else text.count(",") + 1 for name in ARGUMENTS
    }
    assert counts == {name: len(types) for name, types in ARGUMENTS.items()}
    assert {"aclGetRecentErrMsg", "aclrtGetSocName"} <= set(declared)
