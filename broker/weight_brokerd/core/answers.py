"""The answer to a caller whom no source can serve now, with the reason.

`judge` alone decides, for a single caller, for a load group and for Explain.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from weight_broker.errors import (
    AcquireTimeout,
    BrokerError,
    BrokerUnavailable,
    IntegrityError,
    LayoutMismatch,
    NotAttached,
    Reason,
    TransferFailed,
    WeightsNotFound,
)
from weight_broker.key import WeightSetKey
from weight_broker.kinds import EMPTY_KIND
from weight_broker.layout import Layout
from weight_brokerd.core.model import Acquisition, ColdLoadLease, IfAbsent, Remedy, WaitReason
from weight_brokerd.core.publications import Publication, Publications
from weight_brokerd.core.selection import Receiver, Selection, select
from weight_brokerd.core.sources import Refusal, SourceRef
from weight_brokerd.core.weight_sets import WeightSetIndex, WeightSetRecord

STAGE_INSTEAD = {"path": "staged"}
"""Metadata of an error after which a client that offered no staging may ask again with it."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What the caller wants if no source can serve the acquisition."""

    if_absent: IfAbsent
    has_tried: bool = False
    """Whether a source was tried and failed."""

    @classmethod
    def of(cls, acquisition: Acquisition) -> Wish:
        return cls(acquisition.if_absent, bool(acquisition.failed_sources))


@dataclass(frozen=True, slots=True)
class Situation:
    """The facts that decide if no source can serve."""

    is_draining: bool
    is_busy: bool
    """A source fits, but all its reader slots are occupied."""
    is_coming: bool
    """A source fits, but is not readable yet."""
    layout_differs: bool
    lease: ColdLoadLease | None
    """Of an instance that loads the weight set."""
    claim_pending: bool
    """The directory has been asked who loads."""
    unpublishable: str
    """Why the weight set cannot be published, in its last loader's words; empty if it can."""

    @classmethod
    def of(cls, selection: Selection[Publication], record: WeightSetRecord | None, *, is_draining: bool) -> Situation:
        """The situation of a single caller."""
        return cls(
            is_draining=is_draining,
            is_busy=selection.has(Refusal.BUSY),
            is_coming=selection.is_coming,
            layout_differs=selection.has(Refusal.LAYOUT_DIFFERS),
            lease=record.lease if record is not None else None,
            claim_pending=record is not None and record.claim_pending is not None,
            unpublishable=record.unpublishable if record is not None else "",
        )


class Verdict(enum.Enum):
    WAIT_BUSY = "wait_busy"
    WAIT_REGISTERING = "wait_registering"
    WAIT_COLD_LOAD = "wait_cold_load"
    CLAIM_PENDING = "claim_pending"
    CLAIM = "claim"
    REFUSE_DRAINING = "refuse_draining"
    REFUSE_LAYOUT = "refuse_layout"
    REFUSE_UNPUBLISHABLE = "refuse_unpublishable"
    REFUSE_ABSENT = "refuse_absent"


WAITS = {
    Verdict.WAIT_BUSY: WaitReason.SOURCES_BUSY,
    Verdict.WAIT_REGISTERING: WaitReason.REGISTERING,
    Verdict.WAIT_COLD_LOAD: WaitReason.COLD_LOAD,
}


def judge(wish: Wish, situation: Situation) -> Verdict:
    """The verdict: the answer that serves the caller soonest, or the most specific refusal."""
    if situation.is_draining:
        return Verdict.REFUSE_DRAINING
    if situation.is_busy:
        return Verdict.WAIT_BUSY
    if situation.is_coming and situation.lease is None and wish.if_absent is not IfAbsent.FAIL:
        return Verdict.WAIT_REGISTERING
    if situation.layout_differs:
        return Verdict.REFUSE_LAYOUT
    if situation.unpublishable:
        return Verdict.REFUSE_UNPUBLISHABLE
    return _judge_absent(wish, situation)


def _judge_absent(wish: Wish, situation: Situation) -> Verdict:
    """No source, and none that becomes readable by itself."""
    waits = wish.if_absent is IfAbsent.WAIT and not wish.has_tried
    if waits or wish.if_absent is IfAbsent.LOAD:
        if situation.lease is not None:
            return Verdict.WAIT_COLD_LOAD
        if situation.claim_pending:
            return Verdict.CLAIM_PENDING
    return Verdict.CLAIM if wish.if_absent is IfAbsent.LOAD else Verdict.REFUSE_ABSENT


def refusal(
    verdict: Verdict, acquisition: Acquisition, selection: Selection[Publication], record: WeightSetRecord
) -> BrokerError:
    """The error of a verdict that refuses."""
    match verdict:
        case Verdict.REFUSE_DRAINING:
            return draining()
        case Verdict.REFUSE_LAYOUT:
            return _layout_mismatch(acquisition.key, selection)
        case Verdict.REFUSE_UNPUBLISHABLE:
            return _unpublishable(record)
        case Verdict.REFUSE_ABSENT:
            return _absent(acquisition)
        case _:
            raise AssertionError(f"{verdict} does not refuse")


def draining() -> BrokerUnavailable:
    return BrokerUnavailable("the broker is draining and takes no new work; load from disk", reason=Reason.DRAINING)


def late(acquisition: Acquisition, now: float) -> AcquireTimeout:
    waited = now - acquisition.begun_at
    return AcquireTimeout(f"weight set {acquisition.key.id} did not arrive in {waited:.1f} s")


def receiver_failed(detail: str, remedy: Remedy, *, touched: bool, quiesced: bool) -> BrokerError:
    """For a transfer that failed on the receiver's side."""
    if not quiesced:
        text = f"the transfer failed, and the memory may still be written: {detail}"
        return TransferFailed(text, quiesced=False, metadata=STAGE_INSTEAD if remedy is Remedy.STAGING else None)
    match remedy:
        case Remedy.STAGING:
            return TransferFailed(f"the receiver cannot take it: {detail}", metadata=STAGE_INSTEAD)
        case Remedy.STAGE_CONNECTION if not touched:
            return NotAttached.without_stage(detail)
        case _:
            return TransferFailed(f"the receiver gave up: {detail}")


def _layout_mismatch(key: WeightSetKey, selection: Selection[Publication]) -> LayoutMismatch:
    newest = [candidate for candidate in selection.candidates if candidate.refusal is Refusal.LAYOUT_DIFFERS][-1]
    differences = newest.detail
    return LayoutMismatch(
        f"weight set {key.id} is resident with another layout: {differences}",
        metadata={
            "weight_set_id": key.id,
            "publication_id": newest.source.publication_id,
            "differences": differences,
        },
    )


def _unpublishable(record: WeightSetRecord) -> WeightsNotFound:
    return WeightsNotFound(
        f"weight set {record.key.id} cannot be published: {record.unpublishable}; load from disk",
        metadata={"weight_set_id": record.key.id, "unpublishable": record.unpublishable},
    )


def _absent(acquisition: Acquisition) -> BrokerError:
    tried = acquisition.failed_sources
    if not tried:
        return WeightsNotFound(
            f"no instance holds weight set {acquisition.key.id} (model {acquisition.key.model!r}); load from disk",
            metadata={"weight_set_id": acquisition.key.id},
        )
    error = IntegrityError if acquisition.saw_wrong_bytes else TransferFailed
    return error(
        f"every source of weight set {acquisition.key.id} failed: "
        + "; ".join(f"{source.source_id}: {why}" for source, why in tried.items()),
        metadata={
            "weight_set_id": acquisition.key.id,
            "sources": ", ".join(source.source_id for source in tried),
        },
    )


class Outcome(enum.StrEnum):
    """What a new acquisition would get."""

    TRANSFER = "transfer"
    COLD_LOAD = "cold_load"
    WAIT_FOR_COLD_LOAD = "wait_for_cold_load"
    WAIT_FOR_SOURCE = "wait_for_source"
    LAYOUT_MISMATCH = "layout_mismatch"
    DRAINING = "draining"
    UNPUBLISHABLE = "unpublishable"


NEAR_MISSES = 16
_OUTCOMES = {
    Verdict.WAIT_BUSY: (
        Outcome.WAIT_FOR_SOURCE,
        "Every source has as many readers as it may have: it waits for a free slot.",
    ),
    Verdict.WAIT_REGISTERING: (Outcome.WAIT_FOR_SOURCE, "A source is being mapped: it waits for that."),
    Verdict.REFUSE_DRAINING: (
        Outcome.DRAINING,
        "The broker is draining: it refuses, and the instance loads from disk.",
    ),
    Verdict.REFUSE_LAYOUT: (
        Outcome.LAYOUT_MISMATCH,
        "Resident, but with another layout: it is refused and loads from disk.",
    ),
    Verdict.REFUSE_UNPUBLISHABLE: (
        Outcome.UNPUBLISHABLE,
        "It cannot be published ({unpublishable}): it loads from disk without waiting.",
    ),
    Verdict.WAIT_COLD_LOAD: (
        Outcome.WAIT_FOR_COLD_LOAD,
        "A miss ({why}), and {loader} is loading it from disk: it waits.",
    ),
    Verdict.CLAIM_PENDING: (
        Outcome.WAIT_FOR_COLD_LOAD,
        "A miss ({why}), and an instance is about to load it from disk: it waits.",
    ),
    Verdict.CLAIM: (Outcome.COLD_LOAD, "A miss ({why}): it gets the cold-load lease and loads from disk."),
}


@dataclass(frozen=True, slots=True)
class NearMiss:
    """A weight set of the same model whose key differs."""

    weight_set_id: str
    differing_fields: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a new acquisition would get now, and why."""

    weight_set_id: str
    key: WeightSetKey | None
    outcome: Outcome
    summary: str
    selection: Selection[Publication]
    lease: ColdLoadLease | None
    waiting_count: int
    near_misses: tuple[NearMiss, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """The acquisition that Explain is asked about. It would load the weight set if no instance holds it."""

    weight_set_id: str
    key: WeightSetKey | None
    layout: Layout | None
    """None for a receiver that takes any layout."""
    device_kind: str = ""
    """Empty: the kind of memory in which the weight set is published."""
    device_id: str = ""
    other_kinds: frozenset[str] = frozenset()
    """As `Acquisition.other_kinds`."""
    apart_from: Mapping[SourceRef, str] = field(default_factory=dict)
    """Sources that the asking process does not read again, each with the reason."""


def explain(
    question: Question, publications: Publications, weight_sets: WeightSetIndex, host_id: str, *, is_draining: bool
) -> Explanation:
    """What the acquisition would get on this host now."""
    record = weight_sets.find(question.weight_set_id)
    sources = publications.of_weight_set(question.weight_set_id)
    kind = question.device_kind or (sources[-1].device_kind if sources else EMPTY_KIND)
    receiver = Receiver(
        host_id, kind, question.device_id, question.layout, dict(question.apart_from), question.other_kinds
    )  # fmt: skip
    selection = select(sources, receiver)
    situation = Situation.of(selection, record, is_draining=is_draining)
    outcome, summary = _outcome(selection, situation)
    key = question.key or (record.key if record is not None else None)
    return Explanation(
        question.weight_set_id,
        key,
        outcome,
        summary,
        selection,
        situation.lease,
        len(record.waiting) if record is not None else 0,
        _near_misses(weight_sets, question.weight_set_id, key),
    )


def _outcome(selection: Selection[Publication], situation: Situation) -> tuple[Outcome, str]:
    source = selection.chosen
    if source is not None and not situation.is_draining:
        ranks = f", if all {source.rank.size} ranks of an engine ask and can be served" if source.rank else ""
        return (
            Outcome.TRANSFER,
            f"Transferred from {source.publication_id} of {source.holder.name} ({source.instance_id}){ranks}.",
        )
    outcome, summary = _OUTCOMES[judge(Wish(IfAbsent.LOAD), situation)]
    lease = situation.lease
    return outcome, summary.format(
        why="no instance has published it" if not selection.candidates else "no publication of it can be read",
        unpublishable=situation.unpublishable,
        loader=f"{lease.holder.name} ({lease.holder.instance_id})" if lease is not None else "",
    )


def _near_misses(weight_sets: WeightSetIndex, weight_set_id: str, key: WeightSetKey | None) -> tuple[NearMiss, ...]:
    if key is None:
        return ()
    others = [record.key for record in weight_sets.of_model(key.model) if record.key.id != weight_set_id]
    misses = [NearMiss(other.id, key.differing_fields(other)) for other in others]
    return tuple(sorted(misses, key=lambda miss: len(miss.differing_fields))[:NEAR_MISSES])
