"""What is too old or cannot share memory is refused by name, with what to install."""

from __future__ import annotations

from pathlib import Path

import pytest

from weight_broker.drivers import ascend_requirements as requirements
from weight_broker.drivers.cann_symbols import Looked, parse


def test_a_cann_whose_functions_have_older_names_is_named_with_the_engines_that_have_a_newer_one() -> None:
    problem = requirements.cann_problem(Looked({}, ("RaInit in libra.so",)))
    assert "older than 8.5.0" in problem
    assert "no RaInit in libra.so" in problem
    assert "cards.library_path" in problem
    assert "vLLM Ascend 0.13.0rc2" in problem


def test_a_library_that_the_loader_does_not_find_is_named_with_the_setting() -> None:
    problem = requirements.cann_problem(Looked({"libra.so": "libra.so: cannot open shared object file"}, ()))
    assert "libra.so" in problem
    assert "cards.library_path" in problem
    assert "older" not in problem


def test_a_cann_that_has_all_of_it_is_no_problem() -> None:
    assert requirements.cann_problem(Looked({}, ())) == ""


@pytest.mark.parametrize(
    ("soc", "named"),
    [
        ("Ascend310P3", "310P"),
        ("Ascend310B4", "310"),
        ("Ascend910A", "910A"),
        ("Ascend910B", "910A"),
        ("Ascend910ProB", "910A"),
        ("Ascend910PremiumA", "910A"),
    ],
)
def test_chips_that_share_no_memory_are_refused_by_name(soc: str, named: str) -> None:
    assert requirements.chip_problem(soc).startswith(f"{soc} is a {named}: ")


@pytest.mark.parametrize("soc", ["Ascend910B1", "Ascend910B4-1", "Ascend910_9391", "Ascend950PR_9599", ""])
def test_chips_of_the_a2_and_a3_series_and_unknown_ones_are_not_refused(soc: str) -> None:
    assert requirements.chip_problem(soc) == ""


@pytest.mark.parametrize(
    ("device", "is_refused"), [("npu:0", False), ("npu:63", False), ("npu:100", True), ("", False)]
)
def test_virtual_npus_are_refused_by_their_numbers(device: str, is_refused: bool) -> None:
    assert ("virtual NPU" in requirements.virtual_problem(device)) is is_refused


@pytest.mark.parametrize(
    ("version", "is_refused"),
    [("24.1.rc3", True), ("25.0.rc1", False), ("25.5.1", False), (None, False)],
)
def test_drivers_that_share_no_memory_are_refused(version: str | None, is_refused: bool) -> None:
    assert ("install 25.0.rc1" in requirements.driver_problem(version)) is is_refused


@pytest.mark.parametrize(
    ("version", "is_refused"),
    [("0.6.3", True), ("0.7.9", True), ("0.8.0", False), ("0.8.1", False), ("0.10.0", False), (None, False)],
)
def test_a_datasystem_older_than_the_floor_is_refused(version: str | None, is_refused: bool) -> None:
    problem = requirements.datasystem_problem(version)
    assert ("openyuanrong-datasystem>=0.8.0" in problem) is is_refused


@pytest.mark.parametrize(
    ("libc", "python", "machine", "words"),
    [
        (("glibc", "2.28"), (3, 11), "x86_64", "glibc 2.34"),
        (("glibc", "2.34"), (3, 12), "aarch64", "Python 3.9 to 3.11"),
        (("glibc", "2.34"), (3, 13), "x86_64", "Python 3.9 to 3.12"),
        (("glibc", "2.34"), (3, 12), "x86_64", ""),
        (("glibc", "2.35"), (3, 11), "aarch64", ""),
    ],
)
def test_why_there_is_no_wheel_for_a_host_is_said(
    libc: tuple[str, str], python: tuple[int, int], machine: str, words: str
) -> None:
    hindrance = requirements.wheel_hindrance(libc, python, machine)
    assert words in hindrance
    assert bool(hindrance) is bool(words)


def test_the_version_of_a_wheel_is_read_from_its_files(tmp_path: Path) -> None:
    assert requirements.installed_datasystem(tmp_path) is None
    (tmp_path / "VERSION").write_text("0.8.1\n")
    assert requirements.installed_datasystem(tmp_path) == "0.8.1"


@pytest.mark.parametrize("printed", ["", "Segmentation fault", "3", "[1]", "[{}, null]"])
def test_what_is_no_answer_of_the_program_that_looks_is_none(printed: str) -> None:
    assert parse(printed) is None
