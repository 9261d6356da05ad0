"""Asks the drivers of this machine what their contracts say: `python -m weight_brokerd.proof [KIND]`.

Two cards that nothing else uses, no model, about three minutes. It prints a table and writes proof.json, to be attached
to a report. Exit status 1: a row is unlike the source; 2: others use the cards, and nothing was run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from weight_brokerd.proof import report, unit
from weight_brokerd.proof.family import FAMILIES, Family, Row, family
from weight_brokerd.proof.processes import NotRun
from weight_brokerd.proof.runner import ROW_SECONDS, Result, Verdict, results

_UNLIKE, _REFUSED = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    options = parser().parse_args(arguments)
    if options.as_unit is not None:
        return unit.run(options)
    kinds = [options.kind] if options.kind else list(FAMILIES)
    if options.table:
        sys.stdout.writelines(report.markdown(_chosen(family(kind), options.rows)) for kind in kinds)
        return 0
    others = {pid: command for kind in kinds for pid, command in family(kind).others().items()}
    if others and not options.beside_others:
        shown = "; ".join(f"{pid} {command}" for pid, command in others.items())
        return _refuse(f"other processes use the cards: {shown}. End them, or add --beside-others")
    return _prove(kinds, options, {"beside": others})


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="weight_brokerd.proof", description=(__doc__ or "").split("\n\n")[1])
    made.add_argument("kind", nargs="?", choices=tuple(FAMILIES), help="whose driver (all that are found here)")
    made.add_argument("--json", metavar="FILE", default="proof.json", help="- for standard output (proof.json)")
    made.add_argument("--rows", metavar="ID,ID", default="", help="only these: P4.parts, all of P4, all of H")
    made.add_argument("--table", action="store_true", help="print the contract and run nothing")
    made.add_argument("--beside-others", action="store_true", help="although other processes use the cards")
    made.add_argument("--row-seconds", type=float, default=ROW_SECONDS, help="then a row is killed (%(default)s)")
    made.add_argument(
        "--as-unit",
        nargs="*",
        metavar="FILE",
        help=f"run with the properties of {unit.UNIT} as it is installed, or of these files (needs root)",
    )
    return made


def _prove(kinds: Sequence[str], options: argparse.Namespace, host: dict[str, Any]) -> int:
    table = sys.stderr if options.json == "-" else sys.stdout
    done: list[Result] = []
    try:
        for kind in kinds:
            _prove_kind(kind, options, table, host, done)
    finally:
        _write(options.json, report.document(host, done))
    print(f"{len(done)} rows: {report.summary(done)}", file=table)
    if options.json != "-":
        print(f"attach {options.json} to your report", file=table)
    return _UNLIKE if any(result.verdict is Verdict.UNLIKE_SOURCE for result in done) else 0


def _prove_kind(
    kind: str, options: argparse.Namespace, table: TextIO, host: dict[str, Any], done: list[Result]
) -> None:
    try:
        host[kind] = family(kind).host()
    except NotRun as why:
        print(f"{kind}: not run: {why}", file=table)
        return
    for result in results(kind, _chosen(family(kind), options.rows), options.row_seconds):
        print("\n".join(report.lines(result)), file=table, flush=True)
        done.append(result)


def _chosen(driver: Family, names: str) -> list[Row]:
    wanted = [name for name in names.split(",") if name]
    return [row for row in driver.rows() if not wanted or any(_is_meant(row.identity, name) for name in wanted)]


def _is_meant(identity: str, name: str) -> bool:
    return identity == name or identity.startswith(f"{name}.") or (name.isalpha() and identity.startswith(name))


def _write(target: str, document: dict[str, Any]) -> None:
    text = json.dumps(document, indent=1) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        Path(target).write_text(text)


def _refuse(words: str) -> int:
    print(f"proof: {words}", file=sys.stderr)
    return _REFUSED


if __name__ == "__main__":
    sys.exit(main())
