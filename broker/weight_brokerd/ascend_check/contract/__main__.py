"""Compares this machine's driver with the contract: `python -m weight_brokerd.ascend_check.contract [--table]`.

Two cards are needed, and nothing else may run on them. Exit status 1 if a row is unlike the source.
"""

from __future__ import annotations

import argparse
import sys

from weight_brokerd.ascend_check.contract.row import Verdict
from weight_brokerd.ascend_check.contract.table import markdown, outcomes


def main() -> int:
    """Prints the table, or each row with its verdict."""
    parser = argparse.ArgumentParser(prog="weight_brokerd.ascend_check.contract")
    parser.add_argument("--table", action="store_true", help="print the contract and run nothing")
    if parser.parse_args().table:
        sys.stdout.write(markdown())
        return 0
    unlike = 0
    for outcome in outcomes():
        row = outcome.row
        unlike += outcome.verdict is Verdict.UNLIKE_SOURCE
        print(
            f"{row.identity:<14} {outcome.verdict:<18} {row.done}: source {row.expected!r}, here {outcome.seen}",
            flush=True,
        )
    return 1 if unlike else 0


if __name__ == "__main__":
    sys.exit(main())
