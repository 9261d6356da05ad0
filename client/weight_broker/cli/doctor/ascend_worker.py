"""The doctor's check of the datasystem worker: does it answer, and is it new enough?"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from weight_broker.cli import status_cards
from weight_broker.cli.doctor.findings import Finding, ok, problem, warning
from weight_broker.cli.inspector import State
from weight_broker.drivers import datasystem_worker
from weight_broker.drivers.ascend_requirements import DATASYSTEM, worker_problem

_CHECK = "datasystem worker"
_CONNECT_SECONDS = 3.0
_CORRECT = "start it, or correct the address"


def finding(state: State | None, proc: Path = datasystem_worker.PROC) -> Finding:
    """Of the broker's worker, or of the one that DS_WORKER_ADDR names."""
    if state is None or not state.host.HasField("datasystem_worker"):
        return _of_environment(os.environ.get("DS_WORKER_ADDR", ""), proc)
    worker = state.host.datasystem_worker
    line = status_cards.worker_line(worker)
    if not worker.reachable:
        fix = "the broker tries again; see its log" if worker.managed else _CORRECT
        return problem(_CHECK, line, f"{fix}. Until then weights come from disk")
    if worker.problem:
        return warning(_CHECK, *_found_and_fix(line))
    return ok(_CHECK, line) if worker.managed else _judged(line, worker.address, proc)


def _of_environment(address: str, proc: Path) -> Finding:
    if not address:
        return warning(
            _CHECK,
            "the broker uses none and DS_WORKER_ADDR is not set",
            "set datasystem.managed = true in the broker's configuration, or datasystem.worker_address",
        )
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        return problem(_CHECK, f"DS_WORKER_ADDR={address} does not answer: {error}", _CORRECT)
    return _judged(f"DS_WORKER_ADDR={address} answers", address, proc)


def _judged(line: str, address: str, proc: Path) -> Finding:
    """With the version, which the worker itself does not say: by its process, if that can be seen from here."""
    worker = datasystem_worker.find(address, proc)
    if worker is None or not worker.version:
        where = f"its program (pid {worker.pid}) cannot" if worker is not None else "its process cannot"
        return ok(
            _CHECK,
            f"{line}; a worker does not say its version, and {where} be seen from here: `pip show {DATASYSTEM}` in its "
            "environment does",
        )
    words = worker_problem(address, worker.pid, worker.version)
    return warning(_CHECK, *_found_and_fix(words)) if words else ok(_CHECK, f"{line}, {DATASYSTEM} {worker.version}")


def _found_and_fix(words: str) -> tuple[str, str]:
    found, _, fix = words.partition("; ")
    return found, fix
