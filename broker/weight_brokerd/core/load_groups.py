"""The ranks of one engine load all from peers, from publications of one other engine, or all from disk.

A group is decided when all its ranks have asked. They are granted sources together, and told that they are done
together, when every one has every byte; or they are told together to load from disk. Whatever keeps one from it ends
the group, for the others at once, or when their running transfers have ended: nobody is sent to the disk while
somebody still writes to its memory.

A group takes the cold-load leases of its ranks in their order, and only if all are free: of two engines one gets all
that it asks for, and none waits while it holds one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from weight_broker.errors import BrokerError, LoadGroupFailed
from weight_brokerd.core.decisions import ClaimLease, Complete, Decision, Fail, ReleaseLease, TellColdLoad
from weight_brokerd.core.model import (
    Acquisition,
    Arrival,
    ColdLoadLease,
    IfAbsent,
    LeaseClaim,
    Publication,
    RankOfGroup,
    Transfer,
    WaitReason,
)
from weight_brokerd.core.selection import Refusal, Selection, select

if TYPE_CHECKING:
    from weight_brokerd.core.coordinator import Coordinator

ENDED_GROUPS_REMEMBERED = 256

Decisions = list[Decision]


@dataclass(slots=True)
class Group:
    """One engine that loads."""

    group_id: str
    size: int
    deadline: float
    """When all its ranks must have asked."""
    members: dict[int, Acquisition] = field(default_factory=dict)
    arrived: dict[int, tuple[Transfer, Arrival]] = field(default_factory=dict)
    """Ranks that have every byte."""
    leases: dict[int, ColdLoadLease | None] = field(default_factory=dict)
    """Answers of the directory while the leases are being claimed; None if somebody else has it."""
    is_claiming: bool = False
    failure: str = ""
    """Why it ends, if it does."""

    @property
    def in_order(self) -> list[Acquisition]:
        """Its acquisitions by rank."""
        return [self.members[member] for member in sorted(self.members)]


class LoadGroups:
    """All groups, and what follows from events for them."""

    def __init__(self, core: Coordinator) -> None:
        self._core = core
        self._groups: dict[str, Group] = {}
        self._ended: OrderedDict[str, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._groups)

    def join(self, acquisition: Acquisition, rank: RankOfGroup) -> BrokerError | None:
        """A rank asks; why it cannot, if it cannot."""
        why = self._ended.get(rank.group_id)
        if why is not None:
            return _failed(f"the engine's other ranks load from disk already: {why}")
        group = self._groups.get(rank.group_id)
        if group is None:
            group = self._groups[rank.group_id] = Group(rank.group_id, rank.size, float("inf"))
        if group.size != rank.size or rank.member in group.members or group.failure:
            return _failed(f"rank {rank.member} of {rank.size} does not fit group {rank.group_id}, or is there twice")
        group.members[rank.member] = acquisition
        group.deadline = min(group.deadline, acquisition.begun_at + rank.assembly_seconds)
        return None

    def serve(self, acquisition: Acquisition, now: float) -> Decisions:
        """What its group gets now."""
        group = self._group_of(acquisition)
        if group is None:
            return []
        if group.failure:
            return self._end_idle(group)
        if len(group.members) < group.size:
            return self._wait(group, WaitReason.LOAD_GROUP, None)
        if group.is_claiming or any(one.transfer_id for one in group.members.values()):
            return []
        group.arrived.clear()
        return self._decide(group, now)

    def arrived(self, acquisition: Acquisition, transfer: Transfer, arrival: Arrival, now: float) -> Decisions:
        """A rank has every byte."""
        group = self._group_of(acquisition)
        assert group is not None
        acquisition.transfer_id = ""
        if group.failure:
            return self._end_idle(group)
        assert acquisition.rank is not None
        group.arrived[acquisition.rank.member] = (transfer, arrival)
        if len(group.arrived) == group.size:
            done = [(group.members[member], *group.arrived[member]) for member in sorted(group.members)]
            self._dissolve(group)
            return [Complete(one.acquisition_id, transfer, arrival) for one, transfer, arrival in done]
        self._core.weight_sets.record(acquisition.key).waiting[acquisition.acquisition_id] = acquisition
        # Of the others one may have failed before: then this was the last to run, and all begin anew.
        decisions = self._wait(group, WaitReason.LOAD_GROUP, None)
        running = any(one.transfer_id for one in group.members.values())
        return decisions if running else decisions + self.serve(acquisition, now)

    def claimed(self, acquisition: Acquisition, claim: LeaseClaim, now: float) -> Decisions:
        """The directory's answer for the lease of one rank."""
        group = self._group_of(acquisition)
        assert group is not None
        assert acquisition.rank is not None
        group.leases[acquisition.rank.member] = claim.lease if claim.granted else None
        if not claim.granted and len(group.leases) == 1:  # another engine was first
            group.leases.clear()
            group.is_claiming = False
            return self.serve(acquisition, now)
        return self._claim_next(group)

    def left(self, acquisition: Acquisition, why: str) -> Decisions:
        """An acquisition has ended otherwise than with its group, and so ends the group."""
        group = self._group_of(acquisition)
        if group is None or group.members.get(acquisition.rank.member) is not acquisition:  # type: ignore[union-attr]
            return []
        assert acquisition.rank is not None
        del group.members[acquisition.rank.member]
        group.failure = group.failure or f"rank {acquisition.rank.member}: {why}"
        return self._end_idle(group)

    def advance(self, now: float) -> Decisions:
        """Ends the groups whose ranks did not all ask in time."""
        decisions: Decisions = []
        for group in [one for one in self._groups.values() if one.deadline <= now and len(one.members) < one.size]:
            there = ", ".join(map(str, sorted(group.members)))
            group.failure = group.failure or f"only ranks {there} of {group.size} asked in time"
            decisions += self._end_idle(group)
        return decisions

    def next_deadline(self) -> float | None:
        """When `advance` next has something to do."""
        return min((one.deadline for one in self._groups.values() if len(one.members) < one.size), default=None)

    # What follows

    def _decide(self, group: Group, now: float) -> Decisions:
        members = group.in_order
        chosen, others = self._sources(members)
        if chosen is not None:
            decisions: Decisions = []
            for acquisition, publication in zip(members, chosen, strict=True):
                decisions += self._core._grant(acquisition, publication, now)
            return decisions
        if not self._core.draining and any(refusals == {Refusal.BUSY} for refusals in others):
            return self._wait(group, WaitReason.SOURCES_BUSY, None)
        records = [self._core.weight_sets.record(one.key) for one in members]
        for acquisition, record in zip(members, records, strict=True):
            refused = self._core._refusal(record, acquisition, self._selection(acquisition, None))
            if refused is not None:
                return self._core._fail(acquisition, refused)
        lease = next((record.lease for record in records if record.lease is not None), None)
        wanted = {one.if_absent for one in members}
        if lease is None and IfAbsent.FAIL not in wanted and self._are_coming(members):
            return self._wait(group, WaitReason.REGISTERING, None)
        tried = any(one.failed_sources for one in members)
        if lease is not None and IfAbsent.FAIL not in wanted and (wanted == {IfAbsent.LOAD} or not tried):
            return self._wait(group, WaitReason.COLD_LOAD, lease)
        if wanted != {IfAbsent.LOAD}:
            return self._core._fail(members[0], self._core._absent(members[0]))
        if any(record.claim_pending is not None for record in records):
            return []  # whoever asked first hears first, and then this group is asked about again
        group.is_claiming = True
        return self._claim_next(group)

    def _sources(self, members: Sequence[Acquisition]) -> tuple[list[Publication] | None, list[set[Refusal | None]]]:
        """Publications of one engine for all ranks, from the least read engine; or what speaks against each engine."""
        engines = dict.fromkeys(
            publication.group_id
            for publication in self._core.registry.of_weight_set(members[0].key.id)
            if publication.group_id
        )
        found: list[list[Publication]] = []
        refused: list[set[Refusal | None]] = []
        for engine in engines:
            selections = [self._selection(one, engine) for one in members]
            chosen = [one.chosen for one in selections if one.chosen is not None]
            if len(chosen) == len(members):
                found.append(chosen)
                continue
            refused.append(
                {
                    refusal
                    for one in selections
                    if one.chosen is None
                    for refusal in ([candidate.refusal for candidate in one.candidates] or [None])
                }
            )
        return min(found, key=_busyness, default=None), refused

    def _are_coming(self, members: Sequence[Acquisition]) -> bool:
        """Whether an engine has for every rank a source that is there or being mapped, and not there for all."""
        engines = {one.group_id for one in self._core.registry.of_weight_set(members[0].key.id) if one.group_id}
        for engine in engines:
            selections = [self._selection(one, engine) for one in members]
            if all(one.chosen is not None or one.is_coming for one in selections):
                return True
        return False

    def _selection(self, acquisition: Acquisition, engine: str | None) -> Selection:
        publications = self._core.registry.of_weight_set(acquisition.key.id)
        of_engine = [one for one in publications if engine is None or one.group_id == engine]
        return select(of_engine, self._core.receiver(acquisition))

    def _claim_next(self, group: Group) -> Decisions:
        for member in sorted(group.members):
            if member not in group.leases:
                acquisition = group.members[member]
                record = self._core.weight_sets.record(acquisition.key)
                record.claim_pending = acquisition.acquisition_id
                return [ClaimLease(record.key.id, acquisition.instance_id)]
        # Who got no lease loads from disk all the same; somebody outside of any engine loads the same weights.
        decisions: Decisions = []
        members, leases = dict(group.members), dict(group.leases)
        self._dissolve(group)
        for member, acquisition in sorted(members.items()):
            lease = leases[member]
            if lease is not None:
                decisions.append(TellColdLoad(acquisition.acquisition_id, lease))
            else:
                decisions.append(Fail(acquisition.acquisition_id, _failed("the engine loads from disk")))
        return decisions

    def _wait(self, group: Group, reason: WaitReason, lease: ColdLoadLease | None) -> Decisions:
        decisions: Decisions = []
        for acquisition in group.in_order:
            if not acquisition.transfer_id:
                decisions += self._core._wait(acquisition, reason, lease)
        return decisions

    def _end_idle(self, group: Group) -> Decisions:
        """Ends the acquisitions of a failed group that have no running transfer."""
        decisions: Decisions = [ReleaseLease(lease) for lease in group.leases.values() if lease is not None]
        group.leases.clear()
        idle = [one for one in group.in_order if not one.transfer_id]
        for acquisition in idle:
            assert acquisition.rank is not None
            del group.members[acquisition.rank.member]
        if not group.members:
            self._groups.pop(group.group_id, None)
        self._ended[group.group_id] = group.failure
        while len(self._ended) > ENDED_GROUPS_REMEMBERED:
            self._ended.popitem(last=False)
        for acquisition in idle:
            decisions += self._core._fail(acquisition, _failed(f"another rank of the engine failed: {group.failure}"))
        return decisions

    def _dissolve(self, group: Group) -> None:
        """All have been told the same."""
        del self._groups[group.group_id]
        for acquisition in group.members.values():
            self._core._forget(acquisition)

    def _group_of(self, acquisition: Acquisition) -> Group | None:
        return self._groups.get(acquisition.rank.group_id) if acquisition.rank is not None else None


def _busyness(publications: Sequence[Publication]) -> tuple[int, int]:
    return max(len(one.readers) for one in publications), publications[0].generation


def _failed(why: str) -> LoadGroupFailed:
    return LoadGroupFailed(f"{why}; load from disk")
