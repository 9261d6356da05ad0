"""`deploy/ascend-check.sh` on the double: what it will do on an Ascend host, with nothing but the driver replaced."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from doubles.cann.build import CannotBuild, build
from doubles.cann.control import CannHost, Fault, card_name
from doubles.cann.run import variables
from support.datasystem_worker import require_wheel

pytestmark = pytest.mark.timeout(600)
SCRIPT = Path(__file__).parents[3] / "deploy/ascend-check.sh"
SMALL = ["--framework", "acl", "--size", "4M", "--bytes", "8M", "--rounds", "2", "--instances", "1"]


@pytest.fixture(autouse=True)
def _parts() -> None:
    require_wheel()
    try:
        build()
    except CannotBuild as error:
        pytest.skip(str(error))


def run(host: CannHost, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHON": sys.executable, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    return subprocess.run(
        [SCRIPT, *SMALL, "--report", tmp_path / "report.md"],
        env=os.environ | variables(host) | environment,
        capture_output=True,
        text=True,
        timeout=590,
    )


def test_the_report_has_every_step_and_the_main_job(tmp_path: Path) -> None:
    with CannHost(cards=2) as host:
        done = run(host, tmp_path)
        assert done.returncode == 0, done.stderr
        assert host.violations() == []
    report = (tmp_path / "report.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in report.splitlines() if line.startswith("|")
    ]
    measured = {row[0]: row[1:] for row in rows}
    for step in (
        "copy within the card", "host to card", "digest, on the host", "first dev_mget, own memory, 4 blobs; bit-exact",
        "dev_mget, own memory, 4 blobs", "communicator, own memory, 4 blobs: first minus median",
        "export, plain allocation", "import, plain allocation",
        "first dev_mget, another process's plain allocation; bit-exact",
        "export, chunks", "import, chunks", "first dev_mget, another process's chunks; bit-exact", "unmap, chunks",
    ):  # fmt: skip
        assert measured[step][1], step
    assert float(measured["dev_mget, own memory, 4 blobs"][2]) > 0
    assert measured["instance 2"][:3] == [card_name(1), "instance 1", "datasystem"]
    assert measured["instance 3"][:3] == [card_name(0), "instance 2", "datasystem"]
    assert "Everything worked" in report
    assert "exactly the checkpoint's bytes" in report


def test_what_a_driver_refuses_stands_in_the_report_in_its_words(tmp_path: Path) -> None:
    with CannHost(cards=2) as host:
        host.inject(Fault.IMPORT_REFUSED)
        done = run(host, tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    report = (tmp_path / "report.md").read_text()
    assert "things did NOT work" in report
    assert "| import, plain allocation | | not possible | | beside it: aclrtIpcMemImportByKey failed" in report
    # The instances cannot map the broker's staging buffers, as the broker cannot map their memory: they say so and read
    # the disk.
    assert "- instance 2: it read the disk" in report
    assert "- instance 3: it read the disk" in report
