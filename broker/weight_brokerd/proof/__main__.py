"""Compares the drivers of this machine with their sources: `python -m weight_brokerd.proof [--json FILE] [KIND]`.

No model is needed and nothing is changed. Exit status 1 if a row is unlike its source.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast

from weight_brokerd.proof import report
from weight_brokerd.proof.occupants import occupants
from weight_brokerd.proof.processes import NotRun, Scene
from weight_brokerd.proof.row import Outcome, Row, run

PROOFS = {"cuda": "weight_brokerd.proof.cuda.table"}
"""The module of each kind of memory whose driver has a contract."""


class Proof(Protocol):
    """What such a module has."""

    ROWS: tuple[Row[Any], ...]
    DEVICE_FILES: str

    def make_scene(self) -> Scene:
        """For one row."""
        ...

    def facts(self) -> dict[str, Any]:
        """What is to be known of the machine. Raises NotRun if no row can run."""
        ...


def main() -> int:
    """Prints the contract, or each row with its verdict."""
    options = _parser().parse_args()
    kinds = [options.kind] if options.kind else list(PROOFS)
    proofs = {kind: cast("Proof", importlib.import_module(PROOFS[kind])) for kind in kinds}
    if options.table:
        sys.stdout.writelines(report.markdown(proof.ROWS) for proof in proofs.values())
        return 0
    facts: dict[str, Any] = {}
    outcomes: list[Outcome[Any]] = []
    for kind, proof in proofs.items():
        try:
            if not options.beside:
                _require_free(proof)
            facts[kind] = proof.facts()
        except NotRun as why:
            _say(f"{kind}: not run: {why}")
            continue
        outcomes += _printed(proof)
    if options.json is not None:
        options.json.write_text(report.content(outcomes, facts))
        _say(f"{options.json} has all of it; attach this file to a report")
    return _status(outcomes)


def _require_free(proof: Proof) -> None:
    if pids := occupants(proof.DEVICE_FILES):
        listed = ", ".join(map(str, pids))
        raise NotRun(f"processes {listed} use the devices; end them, or prove beside them with --beside")


def _printed(proof: Proof) -> Iterator[Outcome[Any]]:
    for row in proof.ROWS:
        outcome = run(row, proof.make_scene())
        _say(report.line(outcome))
        yield outcome


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _status(outcomes: list[Outcome[Any]]) -> int:
    return 1 if any(outcome.is_fault for outcome in outcomes) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="weight_brokerd.proof", description=__doc__)
    parser.add_argument("kind", nargs="?", choices=PROOFS, help="the only kind of memory to look at")
    parser.add_argument("--table", action="store_true", help="print the contract and run nothing")
    parser.add_argument("--beside", action="store_true", help="run although other processes use the devices")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was seen to this file too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
