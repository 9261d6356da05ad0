"""Ascend: the rows are those of the driver's contract, which the double keeps."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from weight_brokerd.ascend_check.contract import row as contract_row
from weight_brokerd.ascend_check.contract.driver import Scene
from weight_brokerd.ascend_check.contract.machine import facts
from weight_brokerd.ascend_check.contract.table import ROWS
from weight_brokerd.proof.family import Row
from weight_brokerd.proof.occupants import occupants
from weight_brokerd.proof.processes import NotRun

_CARD = r"/dev/davinci\d+"


def environment() -> dict[str, str]:
    """Of the processes that call the driver: libraries are found where a broker's processes would find them."""
    variables = dict(os.environ)
    if path := variables.get("WEIGHT_BROKER_CARDS_LIBRARY_PATH"):
        variables["LD_LIBRARY_PATH"] = path
    return variables


def rows() -> Sequence[Row]:
    """Those without communicators first."""
    return ROWS


def run(row: Row) -> dict[str, Any]:
    """Runs a row of the contract."""
    outcome = contract_row.run(cast(contract_row.Row, row), environment())
    calls = [dataclasses.asdict(call) for call in outcome.calls]
    return {"verdict": outcome.verdict.name.lower(), "seen": outcome.seen, "calls": calls}


def host() -> dict[str, Any]:
    """Versions, device nodes, namespaces, variables. Raises NotRun if there is neither a card nor a runtime."""
    if not any(Path("/dev").glob("davinci[0-9]*")) and not _has_runtime():
        raise NotRun("no Ascend: neither /dev/davinci* nor libascendcl.so are found; source CANN's set_env.sh")
    return facts.host()


def _has_runtime() -> bool:
    with Scene(environment()) as scene:
        return not scene.fresh().missing(("aclInit",))


def others() -> Mapping[int, str]:
    """The processes that have a card open."""
    return occupants(_CARD)
