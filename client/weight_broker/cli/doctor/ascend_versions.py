"""The doctor's checks of what is too old for the broker on an Ascend host, or can never share memory."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from weight_broker.cli.doctor.findings import Finding, ok, problem, warning
from weight_broker.drivers import ascend_requirements
from weight_broker.drivers.cann_symbols import Looked

_ENVIRONMENT = (
    "if this is an instance's environment and the broker has another CANN, nothing; else follow that for the broker"
)


def findings(probed: dict[str, Any], nodes: Sequence[Path], *, is_served: bool) -> Iterator[Finding]:
    """`is_served`: the broker serves an NPU, so what it has is new enough."""
    if "cann" in probed:
        yield _cann(Looked(*probed["cann"]), is_served)
    yield _datasystem(is_served)
    yield from _virtual(nodes)


def _cann(looked: Looked, is_served: bool) -> Finding:
    name = "CANN for the broker"
    words = ascend_requirements.cann_problem(looked)
    if not words:
        return ok(name, f"it has what the datasystem needs ({ascend_requirements.CANN_FLOOR} or newer)")
    found, _, fix = words.partition("; ")
    return warning(name, found, _ENVIRONMENT) if is_served else problem(name, found, fix)


def _datasystem(is_served: bool) -> Finding:
    name = "datasystem wheel"
    try:
        version = importlib.metadata.version(ascend_requirements.DATASYSTEM)
    except importlib.metadata.PackageNotFoundError:
        return _no_wheel(name, is_served)
    words = ascend_requirements.datasystem_problem(version)
    if words:
        found, _, fix = words.partition("; ")
        return problem(name, found, fix)
    return ok(name, f"{ascend_requirements.DATASYSTEM} {version}")


def _no_wheel(name: str, is_served: bool) -> Finding:
    if is_served:
        return ok(name, "not in this environment; the broker has it in its own")
    fix = f"pip install {ascend_requirements.DATASYSTEM} into the environment of the broker; instances need none"
    return warning(name, "not in this environment", ascend_requirements.wheel_hindrance() or fix)


def _virtual(nodes: Sequence[Path]) -> Iterator[Finding]:
    numbers = ((node, re.search(r"(\d+)$", node.name)) for node in nodes)
    virtual = [node.name for node, found in numbers if found and ascend_requirements.is_virtual(int(found[1]))]
    if virtual:
        yield problem(
            "virtual NPUs",
            f"{', '.join(virtual)}: the driver shares no memory of virtual NPUs",
            "give the broker and the engines whole cards",
        )
