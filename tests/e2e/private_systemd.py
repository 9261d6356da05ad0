"""A real systemd as PID 1 of private namespaces, which runs one scenario and powers off.

The scenario is a Python file of this directory. It runs as root beside the services it starts and gets one argument:
the file to which it writes what it saw. Nothing outside the namespaces changes: private_systemd.sh says how.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
FIRST_PROCESS = Path(__file__).with_name("private_systemd.sh")
INSIDE = Path("/run/private-systemd")
"""Where the scenario and its services find the working directory."""

NAMESPACES = ("--mount", "--pid", "--fork", "--cgroup", "--net", "--uts", "--ipc", "--kill-child=SIGKILL")

SCENARIO_TARGET = """[Unit]
DefaultDependencies=no
Requires=scenario.service
"""
SCENARIO_SERVICE = """[Unit]
DefaultDependencies=no
[Service]
Type=oneshot
Environment=PYTHONPATH=/opt/weight-broker/source/tests
ExecStart=/opt/weight-broker/bin/python -B -P /opt/weight-broker/source/tests/e2e/{scenario} {inside}/seen.json
ExecStopPost=/usr/bin/systemctl poweroff --force --force
StandardOutput=append:{inside}/scenario.log
StandardError=append:{inside}/scenario.log
"""


@dataclass(frozen=True)
class CgroupHierarchy:
    """A cgroup hierarchy of the host below which a systemd can live."""

    layout: str
    """"unified" (version 2) or "legacy" (version 1, name=systemd)."""
    path: Path


def find_cgroup_hierarchy() -> CgroupHierarchy | None:
    """The host's unified hierarchy, else the one that version 1 keeps for systemd, else None."""
    found: dict[str, Path] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        kind, _, options = fields[fields.index("-") + 1 :][:3]
        if kind == "cgroup2":
            found["unified"] = Path(fields[4])
        elif kind == "cgroup" and "name=systemd" in options.split(","):
            found["legacy"] = Path(fields[4])
    for layout in ("unified", "legacy"):
        if layout in found:
            return CgroupHierarchy(layout, found[layout])
    return None


def why_not() -> str | None:
    """What this host lacks to run a private systemd; None if it can."""
    if os.geteuid() != 0:
        return "not root"
    for program in ("/lib/systemd/systemd", "/usr/bin/systemctl", "/usr/bin/systemd-sysusers"):
        if not Path(program).exists():
            return f"systemd is not installed ({program} is missing)"
    if shutil.which("unshare") is None:
        return "unshare (util-linux) is not installed"
    hierarchy = find_cgroup_hierarchy()
    if hierarchy is None:
        return "neither cgroup version 2 nor version 1's name=systemd is mounted"
    probe = hierarchy.path / f"private-systemd-probe-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        return f"no cgroup can be made in {hierarchy.path}: {error.strerror}"
    unshared = subprocess.run(
        ["unshare", *NAMESPACES, "mount", "--make-rprivate", "/"],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    if unshared.returncode != 0:
        return f"namespaces cannot be made: {unshared.stderr.strip()}"
    return None


def run_scenario(scenario: str, work: Path, *, timeout: float) -> str:
    """Boots, runs `scenario` (a file name in this directory), powers off and returns what the scenario wrote.

    `work` keeps the log files. AssertionError with all logs if the scenario did not end in time or wrote nothing.
    """
    hierarchy = find_cgroup_hierarchy()
    assert hierarchy is not None
    units = work / "units"
    units.mkdir(parents=True)
    (units / "scenario.target").write_text(SCENARIO_TARGET)
    (units / "scenario.service").write_text(SCENARIO_SERVICE.format(scenario=scenario, inside=INSIDE))
    cgroup = hierarchy.path / f"private-systemd-{os.getpid()}"
    cgroup.mkdir()
    try:
        with (work / "boot.log").open("w") as log:
            systemd = subprocess.Popen(
                # The shell enters the cgroup first, because the cgroup namespace is rooted where its maker is.
                ["bash", "-ec", 'echo $$ > "$0/cgroup.procs"; exec unshare "$@"', cgroup, *NAMESPACES,
                 "bash", FIRST_PROCESS],
                env=_environment(work, hierarchy.layout), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
            try:
                systemd.wait(timeout)
            except subprocess.TimeoutExpired:
                systemd.kill()  # --kill-child takes all that is inside with it
                systemd.wait()
        seen = work / "seen.json"
        assert seen.exists(), f"the scenario reported nothing within {timeout:g} s\n{logs(work)}"
        return seen.read_text()
    finally:
        _remove(cgroup)


def _remove(cgroup: Path) -> None:
    """Removes a cgroup with all below it, as soon as the kernel has taken its last, killed, processes away."""
    deadline = time.monotonic() + 5
    while True:
        try:
            for directory, _, _ in os.walk(cgroup, topdown=False):
                os.rmdir(directory)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def _environment(work: Path, cgroup_layout: str) -> dict[str, str]:
    return {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "WORK": str(work.resolve()),
        "SOURCE": str(REPOSITORY),
        "PYTHON_PREFIX": sys.base_prefix,
        "PYTHON_VERSION": f"{sys.version_info.major}.{sys.version_info.minor}",
        "SITE_PACKAGES": sysconfig.get_path("purelib"),
        "CGROUP_LAYOUT": cgroup_layout,
    }


def logs(work: Path) -> str:
    """Everything that the boot script, the scenario and the services wrote."""
    return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')}" for path in sorted(work.glob("*.log")))
