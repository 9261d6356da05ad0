"""What users install: the source archive, the wheel built from it, and the base installation's few dependencies."""

from __future__ import annotations

import email
import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from support.compiled_copy import skip_without_compiler

REPOSITORY = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
ARCHIVE_NAME = f"weight_broker-{PROJECT['version']}"
SOURCES = {"weight_broker": REPOSITORY / "client", "weight_brokerd": REPOSITORY / "broker"}

BASE_INSTALLATION = ("grpcio", "protobuf", "typing-extensions")
"""The two base dependencies, and what grpcio itself depends on."""

COMPILED = "weight_broker/memory/host/streaming_copy.so.1"

IMPORT_THE_CLIENT = """
import importlib, pkgutil, sys
import weight_broker

for name in weight_broker.__all__:
    getattr(weight_broker, name)
needing_more = ("weight_broker.integrations.", "weight_broker.cli")
for module in pkgutil.walk_packages(weight_broker.__path__, "weight_broker."):
    if not module.name.startswith(needing_more):
        importlib.import_module(module.name)
weight_broker.BrokerClient(sys.argv[1]).close()
print(weight_broker.__file__)
"""

IMPORT_ONLY = """
import sys
import weight_broker
weight_broker.BrokerClient(sys.argv[1])
print(sorted({"grpc", "google.protobuf", "asyncio", "threading"} & sys.modules.keys()))
"""


def run(*command: str | Path, path: Path | None = None, compiler: str = "cc") -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"CC": compiler}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def packaged_files(package: str) -> set[str]:
    root = SOURCES[package]
    files = (
        path
        for path in (root / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and ".so." not in path.name
    )
    return {path.relative_to(root).as_posix() for path in files}


@pytest.fixture(scope="module")
def source_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    run(sys.executable, "-m", "hatchling", "build", "--target=sdist", f"--directory={directory}")
    return directory / f"{ARCHIVE_NAME}.tar.gz"


def build_wheel(source_archive: Path, directory: Path, compiler: str = "cc") -> Path:
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", f"--wheel-dir={directory}")
    run(sys.executable, "-m", "pip", "wheel", *options, source_archive, compiler=compiler)
    (built,) = directory.glob(f"{ARCHIVE_NAME}-*.whl")
    return built


@pytest.fixture(scope="module")
def wheel(source_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(source_archive, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module", params=["no-such-compiler", "false"])
def wheel_without_compiler(
    request: pytest.FixtureRequest, source_archive: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Where there is no compiler, and where it refuses."""
    return build_wheel(source_archive, tmp_path_factory.mktemp("plain-wheel"), compiler=request.param)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new virtual environment with the wheel and nothing else."""
    directory = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", directory)
    python = directory / "bin/python"
    run(sys.executable, "-m", "pip", f"--python={python}", "install", "--quiet", "--no-deps", "--no-index", wheel)
    return python


@pytest.fixture(scope="module")
def base_dependencies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with links to the packages of the base installation and to nothing else."""
    directory = tmp_path_factory.mktemp("dependencies")
    for name in BASE_INSTALLATION:
        distribution = importlib.metadata.distribution(name)
        for file in distribution.files or ():
            # `google` is a namespace that other distributions share.
            depth = 2 if file.parts[0] == "google" else 1
            link = directory.joinpath(*file.parts[:depth])
            if ".." not in file.parts and not link.exists():
                link.parent.mkdir(exist_ok=True)
                link.symlink_to(Path(str(distribution.locate_file(Path(*file.parts[:depth])))))
    return directory


def test_the_wheel_has_the_two_packages_with_generated_code_and_type_markers_and_nothing_else(wheel: Path) -> None:
    skip_without_compiler()
    names = set(zipfile.ZipFile(wheel).namelist())
    packages = {name for name in names if not name.startswith(f"{ARCHIVE_NAME}.dist-info/")}
    assert packages == packaged_files("weight_broker") | packaged_files("weight_brokerd") | {COMPILED}
    assert {"weight_broker/py.typed", "weight_brokerd/py.typed"} <= packages
    assert {"weight_broker/v1/weight_broker_service_pb2.py", "weight_broker/v1/weight_set_pb2.pyi"} <= packages


def test_the_wheel_is_for_the_platform_that_its_library_was_compiled_for(wheel: Path) -> None:
    skip_without_compiler()
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"{ARCHIVE_NAME}-py3-none-{platform}.whl"


def test_without_a_compiler_the_wheel_lacks_the_library_only_and_is_for_every_platform(
    wheel: Path, wheel_without_compiler: Path
) -> None:
    assert wheel_without_compiler.name == f"{ARCHIVE_NAME}-py3-none-any.whl"
    skip_without_compiler()
    plain = set(zipfile.ZipFile(wheel_without_compiler).namelist())
    assert set(zipfile.ZipFile(wheel).namelist()) - plain == {COMPILED}


def test_the_wheel_carries_its_licence_commands_and_dependencies(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    information = f"{ARCHIVE_NAME}.dist-info"
    assert archive.read(f"{information}/licenses/LICENSE") == (REPOSITORY / "LICENSE").read_bytes()
    commands = archive.read(f"{information}/entry_points.txt").decode()
    assert "weight-broker = weight_broker.cli.main:main" in commands
    assert "weight-brokerd = weight_brokerd.__main__:main" in commands
    metadata = email.message_from_bytes(archive.read(f"{information}/METADATA"))
    base = {line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line}
    assert base == {"grpcio>=1.62", "protobuf>=4.25"}
    assert {"ascend", "broker", "cli", "demo", "dev"} <= set(metadata.get_all("Provides-Extra", []))


def test_the_source_archive_has_what_a_distributor_needs(source_archive: Path) -> None:
    with tarfile.open(source_archive) as archive:
        names = {name.removeprefix(f"{ARCHIVE_NAME}/") for name in archive.getnames()}
    assert {
        "LICENSE",
        "README.md",
        "client/native/streaming_copy.c",
        "hatch_build.py",
        "pyproject.toml",
        "proto/weight_broker/v1/weight_set.proto",
        "deploy/systemd/weight-broker.service",
        "tests/e2e/test_packaging.py",
    } <= names
    assert packaged_files("weight_broker") <= {name.removeprefix("client/") for name in names}
    assert not [name for name in names if "__pycache__" in name or name.startswith(".venv") or ".so." in name]


def test_the_client_imports_and_starts_with_grpcio_and_protobuf_only(
    installed: Path, base_dependencies: Path, tmp_path: Path
) -> None:
    imported = run(installed, "-c", IMPORT_THE_CLIENT, tmp_path, path=base_dependencies)
    assert Path(imported.strip()).is_relative_to(installed.parents[1]), "not the installed wheel"


def test_importing_the_client_and_making_one_loads_neither_grpc_nor_protobuf(installed: Path, tmp_path: Path) -> None:
    # No dependency is on the path at all.
    loaded = run(
        installed, "-S", "-c", IMPORT_ONLY, tmp_path, path=next(installed.parents[1].glob("lib/*/site-packages"))
    )
    assert "grpc" not in loaded
    assert "google.protobuf" not in loaded


def test_the_command_starts_or_says_what_to_install_without_its_extra(installed: Path, base_dependencies: Path) -> None:
    result = subprocess.run(
        [installed.with_name("weight-broker"), "--help"],
        capture_output=True, text=True, timeout=60, check=False,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(base_dependencies)},
    )  # fmt: skip
    assert "Traceback" not in result.stderr
    assert result.returncode == 0 or "weight-broker[" in result.stderr
