"""Runs the proof as the broker's unit runs the broker: the same user, groups, devices, namespaces and filters.

A shell sits in the host's mount namespace; there the driver allows what it forbids to a hardened service.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

UNIT = "weight-broker.service"
_PROOF_UNIT = "weight-broker-proof"
_OWN = (
    "Type", "NotifyAccess", "ExecStart", "ExecReload", "ExecStop", "Restart", "TimeoutStart", "TimeoutStop",
    "TimeoutAbort", "WatchdogSec", "KillMode", "RuntimeDirectory", "StateDirectory", "ConfigurationDirectory",
    "SyslogIdentifier",
)  # fmt: skip
"""Settings, by their beginning, that belong to the broker's life and not to what its processes may do. The directories
are the broker's: systemd removes a runtime directory when the unit ends."""
_SPECIFIERS = {"%S": "/var/lib", "%t": "/run", "%C": "/var/cache", "%L": "/var/log"}
"""systemd expands them in files only."""
_PASSED = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "WEIGHT_BROKER_CARDS_LIBRARY_PATH")


def run(options: argparse.Namespace) -> int:
    """The exit status of the proof in the unit. Its JSON comes through the pipe: a unit may write to few places."""
    try:
        text = "\n".join(Path(file).read_text() for file in options.as_unit) or _installed()
    except OSError as error:
        return _refuse(f"--as-unit {error.filename}: {error.strerror}; name files of the unit that can be read")
    if text is None:
        return _refuse(f"`systemctl cat {UNIT}` finds no unit; name its files: --as-unit FILE FILE")
    try:
        done = subprocess.run(command(text, _arguments(options), os.environ), stdout=subprocess.PIPE, check=False)
    except FileNotFoundError:
        return _refuse("there is no systemd-run here; run the proof on a host with systemd, or without --as-unit")
    if not done.stdout:
        return _refuse(f"systemd-run started nothing (exit status {done.returncode}); its words are above")
    _write(options.json, done.stdout)
    return done.returncode


def _write(target: str, document: bytes) -> None:
    if target == "-":
        sys.stdout.write(document.decode())
    else:
        Path(target).write_bytes(document)


def _refuse(words: str) -> int:
    print(f"proof: {words}", file=sys.stderr)
    return 2


def command(text: str, arguments: Iterable[str], environment: Mapping[str, str]) -> list[str]:
    """systemd-run with the settings of a unit. `text`: the unit's file and its drop-ins, one after the other."""
    passed = [f"--setenv={name}={environment[name]}" for name in environment if _is_passed(name)]
    settings = [f"--property={setting}" for setting in properties(text)]
    start = ["systemd-run", "--quiet", "--wait", "--pipe", "--collect", f"--unit={_PROOF_UNIT}"]
    settings += [f"--property=StateDirectory={_PROOF_UNIT}", f"--property=WorkingDirectory=/var/lib/{_PROOF_UNIT}"]
    return [*start, *settings, *passed, sys.executable, "-m", "weight_brokerd.proof", *arguments]


def properties(text: str) -> list[str]:
    """The settings of [Service] that decide what the unit's processes may do, in their order: a later one may replace
    an earlier one or add to it, and systemd knows which."""
    section, found = "", []
    for line in map(str.strip, text.splitlines()):
        if line.startswith("["):
            section = line
        elif section == "[Service]" and "=" in line and line[0] not in "#;" and not line.startswith(_OWN):
            found.append(_expanded(line))
    return found


def _expanded(line: str) -> str:
    for specifier, meaning in _SPECIFIERS.items():
        line = line.replace(specifier, meaning)
    return line


def _is_passed(name: str) -> bool:
    return name in _PASSED or name.startswith(("ASCEND_", "HCCL_", "DS_"))


def _arguments(options: argparse.Namespace) -> list[str]:
    kind = [options.kind] if options.kind else []
    beside = ["--beside-others"] if options.beside_others else []
    return [*kind, *beside, "--rows", options.rows, "--row-seconds", str(options.row_seconds), "--json", "-"]


def _installed() -> str | None:
    try:
        found = subprocess.run(["systemctl", "cat", UNIT], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout if not found.returncode else None
