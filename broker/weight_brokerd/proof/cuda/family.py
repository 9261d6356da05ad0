"""NVIDIA's driver, for the proof."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from weight_brokerd.proof import row as cuda_row
from weight_brokerd.proof.cuda import table
from weight_brokerd.proof.cuda.scene import CudaScene
from weight_brokerd.proof.family import Row
from weight_brokerd.proof.occupants import occupants
from weight_brokerd.proof.runner import Verdict


def rows() -> Sequence[Row]:
    """In the order of the table."""
    return table.ROWS


def run(row: Row) -> dict[str, Any]:
    """Runs a row of the contract. One that no source decides is recorded."""
    outcome = cuda_row.run(cast("cuda_row.Row[CudaScene]", row), table.make_scene())
    verdict = Verdict(outcome.verdict.name.lower())
    if verdict is Verdict.UNLIKE_SOURCE and not outcome.is_fault:
        verdict = Verdict.RECORDED
    return {"verdict": verdict, "seen": outcome.seen, "calls": [{"name": name} for name in row.functions]}


def host() -> dict[str, Any]:
    """Row G0."""
    return table.facts()


def others() -> Mapping[int, str]:
    """The processes that have a GPU open."""
    return occupants(table.DEVICE_FILES)
