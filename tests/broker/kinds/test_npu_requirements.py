"""A broker without what NPUs need says so when it starts: what is missing, what to install, which engines have it."""

from __future__ import annotations

import asyncio
import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import pytest

from support.asynchronous import on_a_loop
from support.cann_libraries import RELEASE_8_3, RELEASE_8_5, compile_libraries
from weight_broker.drivers import cann_symbols
from weight_brokerd.cards.configuration import CardsConfiguration
from weight_brokerd.cards.probe import Device
from weight_brokerd.config.errors import StartError
from weight_brokerd.kinds.npu import supervisor
from weight_brokerd.kinds.npu.requirements import require

NOWHERE = Path("/nowhere/version.info")


def with_libraries(directory: Path) -> CardsConfiguration:
    return CardsConfiguration("", 0, library_path=str(directory))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Installs a wheel of the datasystem; the file that has its version."""
    package = tmp_path / "wheel"
    package.mkdir()
    spec = importlib.machinery.ModuleSpec("yr.datasystem", None, is_package=True)
    spec.submodule_search_locations = [str(package)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if "datasystem" in name else None)
    (package / "VERSION").write_text("0.8.1\n")
    return package / "VERSION"


@on_a_loop
async def test_a_cann_of_8_5_with_a_new_wheel_is_enough(tmp_path: Path, installed: Path) -> None:
    await require(with_libraries(compile_libraries(tmp_path, RELEASE_8_5)), NOWHERE)


@on_a_loop
async def test_a_cann_of_8_3_is_refused_by_the_names_that_it_lacks(tmp_path: Path, installed: Path) -> None:
    with pytest.raises(StartError, match=r"older than 8\.5\.0.*RaInit in libra\.so.*hrtGetDeviceRefresh") as caught:
        await require(with_libraries(compile_libraries(tmp_path, RELEASE_8_3)), NOWHERE)
    assert "vLLM Ascend 0.13.0rc2" in str(caught.value)


@on_a_loop
async def test_libraries_that_are_not_there_are_refused_with_the_setting(tmp_path: Path, installed: Path) -> None:
    with pytest.raises(StartError, match=r"libra\.so and libhccl_plf\.so .*cards\.library_path"):
        await require(with_libraries(tmp_path), NOWHERE)


def test_a_wheel_that_is_too_old_is_refused_at_the_start(tmp_path: Path, installed: Path) -> None:
    installed.write_text("0.6.3\n")
    configuration = with_libraries(compile_libraries(tmp_path, RELEASE_8_5))
    with pytest.raises(StartError, match=r"openyuanrong-datasystem 0\.6\.3 is older than 0\.8\.0"):
        asyncio.run(require(configuration, NOWHERE))


def test_a_driver_that_is_too_old_is_refused_together_with_all_else(tmp_path: Path, installed: Path) -> None:
    version = tmp_path / "version.info"
    version.write_text("Version=24.1.rc3\n")
    with pytest.raises(StartError, match=r"driver \(HDK\) 24\.1\.rc3 .*libra\.so"):
        asyncio.run(require(with_libraries(tmp_path), version))


@on_a_loop
async def test_a_program_that_ends_while_it_looks_is_no_reason_to_refuse(
    tmp_path: Path, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    await require(with_libraries(tmp_path), NOWHERE)


def test_the_program_looks_for_the_names_that_the_plugin_binds() -> None:
    assert {library: tuple(names) for library, names in RELEASE_8_5.items()} == cann_symbols.NEEDED


@pytest.mark.parametrize(
    ("device", "words"),
    [
        (Device(0, "npu:0", "Ascend310P3"), "310P"),
        (Device(0, "npu:0", "Ascend910A"), "910A"),
        (Device(0, "npu:100", "Ascend910B4"), "virtual NPU"),
        (Device(0, "npu:0", "Ascend910A", "error 507033"), "error 507033"),
        (Device(0, "npu:0", "Ascend910B4"), ""),
    ],
)
def test_cards_that_cannot_share_memory_are_failed_by_name(device: Device, words: str) -> None:
    problem = supervisor._judged(device).problem
    assert words in problem
    assert bool(problem) is bool(words)
