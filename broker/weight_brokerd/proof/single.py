"""Runs one row, in this process and in children of it: `python -m weight_brokerd.proof.single KIND ROW` prints JSON."""

from __future__ import annotations

import json
import sys

from weight_brokerd.proof.family import family


def main(kind: str, identity: str) -> None:
    """The row's outcome is the only line on standard output."""
    driver = family(kind)
    [row] = [row for row in driver.rows() if row.identity == identity]
    print(json.dumps(driver.run(row)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
