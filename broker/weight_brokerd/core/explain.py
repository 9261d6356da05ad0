"""Why would this weight set hit or miss now?

The same selection that serves an acquisition is asked, so that the explanation cannot differ from what happens.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from weight_broker.key import WeightSetKey
from weight_broker.layout import Layout
from weight_brokerd.core.coordinator import Coordinator
from weight_brokerd.core.model import ColdLoadLease
from weight_brokerd.core.selection import Receiver, Refusal, Selection, select

NEAR_MISSES = 16


class Outcome(enum.StrEnum):
    """What an acquisition would get."""

    TRANSFER = "transfer"
    COLD_LOAD = "cold_load"
    WAIT_FOR_COLD_LOAD = "wait_for_cold_load"
    WAIT_FOR_SOURCE = "wait_for_source"
    LAYOUT_MISMATCH = "layout_mismatch"
    DRAINING = "draining"
    UNPUBLISHABLE = "unpublishable"


@dataclass(frozen=True, slots=True)
class NearMiss:
    """A weight set of the same model whose key differs."""

    weight_set_id: str
    differing_fields: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """What an acquisition would get now, and why."""

    weight_set_id: str
    key: WeightSetKey | None
    outcome: Outcome
    summary: str
    selection: Selection
    lease: ColdLoadLease | None
    waiting_count: int
    near_misses: tuple[NearMiss, ...]


def explain(
    coordinator: Coordinator,
    *,
    weight_set_id: str,
    key: WeightSetKey | None,
    layout: Layout | None,
    device_kind: str = "cpu",
) -> Explanation:
    """Explains what an acquisition of this weight set by a new instance on this host would get."""
    record = coordinator.weight_sets.find(weight_set_id)
    receiver = Receiver(coordinator.host_id, device_kind, "", layout, {})
    selection = select(coordinator.registry.of_weight_set(weight_set_id), receiver)
    lease = record.lease if record is not None else None
    outcome, summary = _outcome(coordinator, selection, lease, record.unpublishable if record is not None else "")
    key = key if key is not None else record.key if record is not None else None
    return Explanation(
        weight_set_id,
        key,
        outcome,
        summary,
        selection,
        lease,
        len(record.waiting) if record is not None else 0,
        _near_misses(coordinator, weight_set_id, key),
    )


def _outcome(
    coordinator: Coordinator, selection: Selection, lease: ColdLoadLease | None, unpublishable: str
) -> tuple[Outcome, str]:
    if coordinator.draining:
        return Outcome.DRAINING, "The broker is draining: it refuses, and the instance loads from disk."
    if selection.chosen is not None:
        source = selection.chosen
        ranks = f", if all {source.rank.size} ranks of an engine ask and can be served" if source.rank else ""
        return (
            Outcome.TRANSFER,
            f"Transferred from {source.publication_id} of {source.instance_name} ({source.instance_id}){ranks}.",
        )
    if selection.has(Refusal.BUSY):
        return Outcome.WAIT_FOR_SOURCE, "Every source has as many readers as it may have: it waits for a free slot."
    if selection.has(Refusal.LAYOUT_DIFFERS):
        return Outcome.LAYOUT_MISMATCH, "Resident, but with another layout: it is refused and loads from disk."
    if unpublishable:
        return Outcome.UNPUBLISHABLE, f"It cannot be published ({unpublishable}): it loads from disk without waiting."
    why = "nobody has published it" if not selection.candidates else "no publication of it can be read"
    if lease is not None:
        return (
            Outcome.WAIT_FOR_COLD_LOAD,
            f"A miss ({why}), and {lease.instance_name} ({lease.instance_id}) is loading it from disk: it waits.",
        )
    return Outcome.COLD_LOAD, f"A miss ({why}): it gets the cold-load lease and loads from disk."


def _near_misses(coordinator: Coordinator, weight_set_id: str, key: WeightSetKey | None) -> tuple[NearMiss, ...]:
    if key is None:
        return ()
    others = [record.key for record in coordinator.weight_sets.of_model(key.model) if record.key.id != weight_set_id]
    misses = [NearMiss(other.id, key.differing_fields(other)) for other in others]
    return tuple(sorted(misses, key=lambda miss: len(miss.differing_fields))[:NEAR_MISSES])
