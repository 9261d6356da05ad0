"""The ranks of one engine load all from peers, from publications of one other engine, or all from disk.

A group is decided when all its ranks have asked. They are granted sources together, and complete together when every
rank has every byte; or they load from disk together. The failure of one rank ends the group for the others, at once or
when their running transfers have ended: no rank is sent to the disk while its memory may still be written.

A group claims the cold-load leases of its ranks in rank order, and only if all are free: of two engines one gets all
leases, and neither waits while it holds a lease.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from weight_broker.errors import BrokerError, LoadGroupFailed
from weight_brokerd.core.acquisitions import Acquisitions
from weight_brokerd.core.answers import WAITS, Situation, Verdict, Wish, judge, refusal
from weight_brokerd.core.decisions import ClaimLease, Decisions, ReleaseLease
from weight_brokerd.core.model import Acquisition, Arrival, ColdLoadLease, IfAbsent, LeaseClaim, RankOfGroup, WaitReason
from weight_brokerd.core.publications import Publication, Publications
from weight_brokerd.core.selection import Receiver, Selection, select
from weight_brokerd.core.sources import Refusal
from weight_brokerd.core.transfers import Transfer
from weight_brokerd.core.weight_sets import WeightSetIndex

ENDED_GROUPS_REMEMBERED = 256


@dataclass(slots=True)
class Group:
    """The ranks of one engine that loads."""

    group_id: str
    size: int
    deadline: float
    """When all ranks must have asked."""
    members: dict[int, Acquisition] = field(default_factory=dict)
    arrived: dict[int, tuple[Transfer, Arrival]] = field(default_factory=dict)
    """Ranks that have every byte."""
    leases: dict[int, ColdLoadLease | None] = field(default_factory=dict)
    """Answers of the directory while the leases are being claimed; None for a lease that another instance has."""
    is_claiming: bool = False
    failure: str = ""
    """Why the group ends; empty while it goes on."""

    @property
    def in_order(self) -> list[Acquisition]:
        """Its acquisitions by rank."""
        return [self.members[member] for member in sorted(self.members)]

    @property
    def wish(self) -> Wish:
        """The wish of all ranks together: the least patient rank decides."""
        wishes = [Wish.of(acquisition) for acquisition in self.members.values()]
        wanted = {wish.if_absent for wish in wishes}
        if_absent = next(choice for choice in (IfAbsent.FAIL, IfAbsent.WAIT, IfAbsent.LOAD) if choice in wanted)
        return Wish(if_absent, any(wish.has_tried for wish in wishes))


class LoadGroups:
    """All groups, and what follows from events for them."""

    def __init__(
        self, host_id: str, acquisitions: Acquisitions, publications: Publications, weight_sets: WeightSetIndex
    ) -> None:
        self._host_id = host_id
        self._acquisitions = acquisitions
        self._publications = publications
        self._weight_sets = weight_sets
        self._groups: dict[str, Group] = {}
        self._ended: OrderedDict[str, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._groups)

    def join(self, acquisition: Acquisition, rank: RankOfGroup) -> BrokerError | None:
        """A rank asks. Returns the error if it cannot join its group."""
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

    def serve(self, acquisition: Acquisition, now: float, *, is_draining: bool) -> Decisions:
        """Serve the acquisition's group."""
        group = self._group_of(acquisition)
        if group is None:
            return []
        if group.failure:
            return self._end_idle(group)
        if len(group.members) < group.size:
            return self._wait(group, WaitReason.LOAD_GROUP, None)
        if group.is_claiming or any(member.transfer_id for member in group.members.values()):
            return []
        group.arrived.clear()
        return self._decide(group, now, is_draining=is_draining)

    def arrived(self, acquisition: Acquisition, transfer: Transfer, arrival: Arrival) -> Decisions:
        """A rank has every byte: it waits for the others, or ends with them if one of them failed before."""
        group = self._group_of(acquisition)
        assert group is not None
        assert acquisition.rank is not None
        acquisition.transfer_id = ""
        if group.failure:
            return self._end_idle(group)
        group.arrived[acquisition.rank.member] = (transfer, arrival)
        if len(group.arrived) == group.size:
            return self._complete(group)
        self._acquisitions.wait_again(acquisition)
        return self._wait(group, WaitReason.LOAD_GROUP, None)

    def claimed(self, acquisition: Acquisition, claim: LeaseClaim) -> Decisions:
        """The directory's answer for the lease of one rank."""
        group = self._group_of(acquisition)
        assert group is not None
        assert acquisition.rank is not None
        group.leases[acquisition.rank.member] = claim.lease if claim.granted else None
        if not claim.granted and len(group.leases) == 1:  # another engine claimed first
            group.leases.clear()
            group.is_claiming = False
            return []
        return self._claim_next(group)

    def member_ended(self, acquisition: Acquisition, why: str) -> Decisions:
        """An acquisition has ended before its group, and so ends the group."""
        rank, group = acquisition.rank, self._group_of(acquisition)
        if group is None or rank is None or group.members.get(rank.member) is not acquisition:
            return []
        del group.members[rank.member]
        group.failure = group.failure or f"rank {rank.member}: {why}"
        return self._end_idle(group)

    def advance(self, now: float) -> Decisions:
        """Ends the groups whose ranks did not all ask in time."""
        decisions: Decisions = []
        for group in [group for group in self._incomplete() if group.deadline <= now]:
            there = ", ".join(map(str, sorted(group.members)))
            group.failure = group.failure or f"only ranks {there} of {group.size} asked in time"
            decisions += self._end_idle(group)
        return decisions

    def next_deadline(self) -> float | None:
        """When `advance` is due next."""
        return min((group.deadline for group in self._incomplete()), default=None)

    # What follows

    def _incomplete(self) -> list[Group]:
        return [group for group in self._groups.values() if len(group.members) < group.size]

    def _decide(self, group: Group, now: float, *, is_draining: bool) -> Decisions:
        chosen, situation = self._look(group.in_order, is_draining=is_draining)
        if chosen is not None:
            pairs = zip(group.in_order, chosen, strict=True)
            return [
                decision
                for acquisition, publication in pairs
                for decision in self._acquisitions.grant(acquisition, publication, now)
            ]
        verdict = judge(group.wish, situation)
        if verdict in WAITS:
            return self._wait(group, WAITS[verdict], situation.lease if verdict is Verdict.WAIT_COLD_LOAD else None)
        if verdict is Verdict.CLAIM_PENDING:
            return []  # this group is served again once the directory has answered the claimant
        if verdict is Verdict.CLAIM:
            group.is_claiming = True
            return self._claim_next(group)
        return self._refuse(group, verdict)

    def _look(self, members: Sequence[Acquisition], *, is_draining: bool) -> tuple[list[Publication] | None, Situation]:
        """Publications of one engine for all ranks, from the engine with the fewest readers; and the situation that
        decides if there are none."""
        found: list[list[Publication]] = []
        is_busy = is_coming = False
        for engine in self._engines(members[0]):
            selections = [self._select(member, engine) for member in members]
            chosen = [selection.chosen for selection in selections if selection.chosen is not None]
            if len(chosen) == len(members):
                found.append(chosen)
                continue
            unserved = [selection for selection in selections if selection.chosen is None]
            is_busy = is_busy or all(selection.refusals == {Refusal.BUSY} for selection in unserved)
            is_coming = is_coming or all(selection.is_coming for selection in unserved)
        return min(found, key=_busyness, default=None), self._situation(members, is_draining, is_busy, is_coming)

    def _situation(
        self, members: Sequence[Acquisition], is_draining: bool, is_busy: bool, is_coming: bool
    ) -> Situation:
        """The situation of all ranks together: sources count by engine, every other fact if it holds for any rank."""
        records = [self._weight_sets.record(member.key) for member in members]
        return Situation(
            is_draining=is_draining,
            is_busy=is_busy,
            is_coming=is_coming,
            layout_differs=any(self._layout_differs(member) for member in members),
            lease=next((record.lease for record in records if record.lease is not None), None),
            claim_pending=any(record.claim_pending is not None for record in records),
            unpublishable=next((record.unpublishable for record in records if record.unpublishable), ""),
        )

    def _refuse(self, group: Group, verdict: Verdict) -> Decisions:
        """Fails the rank that the verdict is about; the others end with it."""
        members = group.in_order
        member = next((member for member in members if self._concerns(verdict, member)), members[0])
        record = self._weight_sets.record(member.key)
        return self._acquisitions.fail(member, refusal(verdict, member, self._select(member, None), record))

    def _concerns(self, verdict: Verdict, acquisition: Acquisition) -> bool:
        if verdict is Verdict.REFUSE_LAYOUT:
            return self._layout_differs(acquisition)
        is_unpublishable = bool(self._weight_sets.record(acquisition.key).unpublishable)
        return verdict is Verdict.REFUSE_UNPUBLISHABLE and is_unpublishable

    def _engines(self, acquisition: Acquisition) -> list[str]:
        publications = self._publications.of_weight_set(acquisition.key.id)
        return list(dict.fromkeys(publication.group_id for publication in publications if publication.group_id))

    def _layout_differs(self, acquisition: Acquisition) -> bool:
        selection = self._select(acquisition, None)
        return selection.chosen is None and selection.has(Refusal.LAYOUT_DIFFERS)

    def _select(self, acquisition: Acquisition, engine: str | None) -> Selection[Publication]:
        publications = self._publications.of_weight_set(acquisition.key.id)
        of_engine = [publication for publication in publications if engine is None or publication.group_id == engine]
        return select(of_engine, Receiver.of(acquisition, self._host_id))

    def _claim_next(self, group: Group) -> Decisions:
        for member in sorted(group.members):
            if member not in group.leases:
                acquisition = group.members[member]
                record = self._weight_sets.record(acquisition.key)
                record.claim_pending = acquisition.acquisition_id
                return [ClaimLease(record.key.id, acquisition.instance_id)]
        return self._load_from_disk(group)

    def _load_from_disk(self, group: Group) -> Decisions:
        """All ranks load, also a rank whose lease an instance outside of any engine holds."""
        decisions: Decisions = []
        for member, acquisition in self._dissolve(group):
            lease = group.leases[member]
            if lease is not None:
                decisions += self._acquisitions.load_from_disk(acquisition, lease)
            else:
                decisions += self._acquisitions.fail(acquisition, _failed("the engine loads from disk"))
        return decisions

    def _complete(self, group: Group) -> Decisions:
        return [
            decision
            for member, acquisition in self._dissolve(group)
            for decision in self._acquisitions.complete(acquisition, *group.arrived[member])
        ]

    def _wait(self, group: Group, reason: WaitReason, lease: ColdLoadLease | None) -> Decisions:
        decisions: Decisions = []
        for acquisition in group.in_order:
            if not acquisition.transfer_id:
                decisions += self._acquisitions.wait(acquisition, reason, lease)
        return decisions

    def _end_idle(self, group: Group) -> Decisions:
        """Ends the acquisitions of a failed group that have no running transfer."""
        decisions: Decisions = [ReleaseLease(lease) for lease in group.leases.values() if lease is not None]
        group.leases.clear()
        idle = {member: group.members[member] for member in sorted(group.members)}
        idle = {member: acquisition for member, acquisition in idle.items() if not acquisition.transfer_id}
        for member in idle:
            del group.members[member]
        if not group.members:
            self._groups.pop(group.group_id, None)
        self._remember_end(group)
        for acquisition in idle.values():
            error = _failed(f"another rank of the engine failed: {group.failure}")
            decisions += self._acquisitions.fail(acquisition, error)
        return decisions

    def _remember_end(self, group: Group) -> None:
        self._ended[group.group_id] = group.failure
        while len(self._ended) > ENDED_GROUPS_REMEMBERED:
            self._ended.popitem(last=False)

    def _dissolve(self, group: Group) -> list[tuple[int, Acquisition]]:
        """Remove the group; returns its members by rank, all of which end now."""
        del self._groups[group.group_id]
        return sorted(group.members.items())

    def _group_of(self, acquisition: Acquisition) -> Group | None:
        return self._groups.get(acquisition.rank.group_id) if acquisition.rank is not None else None


def _busyness(publications: Sequence[Publication]) -> tuple[int, int]:
    return max(len(publication.readers) for publication in publications), publications[0].generation


def _failed(why: str) -> LoadGroupFailed:
    return LoadGroupFailed(f"{why}; load from disk")
