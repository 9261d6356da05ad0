"""All rows, in the order in which they are run."""

from __future__ import annotations

from weight_brokerd.ascend_check.contract import chunks, devices, keys, links, peers, streams, symbols
from weight_brokerd.ascend_check.contract.machine import arrays, costs, facts, network, occupation, store
from weight_brokerd.ascend_check.contract.machine import peers as peers_seen
from weight_brokerd.ascend_check.contract.row import Row

_ALONE = facts, symbols, devices, keys, chunks, peers, peers_seen, arrays, costs, occupation, streams
_WITH_COMMUNICATORS = links, network, store
ROWS: tuple[Row, ...] = tuple(row for module in (*_ALONE, *_WITH_COMMUNICATORS) for row in module.ROWS)
"""Those without communicators first: HCCL keeps its ports for as long as a process lives."""


def covered() -> frozenset[str]:
    """The functions that have a row."""
    return frozenset(name for row in ROWS for name in row.functions)
