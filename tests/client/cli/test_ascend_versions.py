"""The doctor on what is too old for the broker."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.cann_libraries import RELEASE_8_3, RELEASE_8_5, compile_libraries
from weight_broker.cli.doctor import ascend_versions
from weight_broker.cli.doctor.findings import Finding, Verdict
from weight_broker.drivers import acl


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Installs a version of the datasystem's wheel, or none."""

    def install(version: str | None) -> None:
        def answer(name: str) -> str:
            if version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(importlib.metadata, "version", answer)

    return install


def look(probed: dict[str, Any], *names: str, is_served: bool = False) -> dict[str, Finding]:
    nodes = [Path("/dev", name) for name in names]
    return {found.check: found for found in ascend_versions.findings(probed, nodes, is_served=is_served)}


def probe(libraries: Path) -> dict[str, Any]:
    """What the doctor's own process says of these libraries."""
    done = subprocess.run(
        [sys.executable, "-m", "weight_broker.cli.doctor.probe"],
        env=os.environ | {"LD_LIBRARY_PATH": str(libraries)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.parametrize(
    ("release", "verdict"), [(RELEASE_8_3, Verdict.PROBLEM), (RELEASE_8_5, Verdict.OK)], ids=["8.3", "8.5"]
)
def test_the_cann_that_the_doctor_sees_is_judged_by_its_functions(
    tmp_path: Path, release: dict[str, Any], verdict: Verdict
) -> None:
    runtime = {acl.LIBRARY: [name for name in acl.ARGUMENTS if name != "aclrtGetDeviceCount"]}
    found = look(probe(compile_libraries(tmp_path, {**release, **runtime})))["CANN for the broker"]
    assert found.verdict is verdict
    if verdict is Verdict.PROBLEM:
        assert "RaInit in libra.so" in found.found
        assert "vLLM Ascend 0.13.0rc2" in found.fix


def test_libraries_that_do_not_load_are_named_with_the_setting() -> None:
    found = look({"cann": [{"libra.so": "a; b", "libhccl_plf.so": "c"}, []]})["CANN for the broker"]
    assert "libra.so and libhccl_plf.so" in found.found
    assert "cards.library_path" in found.fix


def test_where_the_broker_serves_cards_another_cann_here_is_only_a_warning() -> None:
    found = look({"cann": [{}, ["RaInit in libra.so"]]}, is_served=True)["CANN for the broker"]
    assert found.verdict is Verdict.WARNING


def test_where_there_is_no_runtime_nothing_is_said_of_its_functions() -> None:
    assert "CANN for the broker" not in look({})


@pytest.mark.parametrize(
    ("version", "is_served", "verdict"),
    [
        ("0.8.1", False, Verdict.OK),
        ("0.6.3", False, Verdict.PROBLEM),
        (None, False, Verdict.WARNING),
        (None, True, Verdict.OK),
    ],
)
def test_the_wheel_of_the_datasystem_is_judged_by_its_version(
    wheel: Callable[[str | None], None], version: str | None, is_served: bool, verdict: Verdict
) -> None:
    wheel(version)
    assert look({}, is_served=is_served)["datasystem wheel"].verdict is verdict


@pytest.mark.parametrize(
    ("nodes", "virtual"),
    [(["davinci0", "davinci15"], ""), (["davinci0", "davinci100"], "davinci100"), (["vdavinci101"], "vdavinci101")],
)
def test_virtual_npus_are_a_problem(nodes: list[str], virtual: str) -> None:
    found = look({}, *nodes).get("virtual NPUs")
    assert (found.found.split(":")[0] if found else "") == virtual
