"""The open acquisitions. Each ends exactly once; a second end does nothing."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator

from weight_broker.errors import BrokerError, Reason
from weight_brokerd.core.decisions import (
    Complete,
    Decisions,
    Ending,
    Fail,
    LoadFromDisk,
    Reserve,
    TransferChanged,
    Wait,
    WeightSetChanged,
)
from weight_brokerd.core.model import Acquisition, Arrival, ColdLoadLease, Process, WaitReason
from weight_brokerd.core.publications import Publication, Publications, Room
from weight_brokerd.core.transfers import Transfer, TransferLog
from weight_brokerd.core.weight_sets import WeightSetIndex

DROPPED = "its process went away"

TRANSFERRED, COLD_LOAD, ABANDONED = "transferred", "cold_load", "abandoned"
OUTCOMES = (
    TRANSFERRED,
    COLD_LOAD,
    ABANDONED,
    *(
        reason.value.lower()
        for reason in (
            Reason.WEIGHTS_NOT_FOUND,
            Reason.LAYOUT_MISMATCH,
            Reason.ACQUIRE_TIMEOUT,
            Reason.TRANSFER_FAILED,
            Reason.INTEGRITY_ERROR,
            Reason.LOAD_GROUP_FAILED,
            Reason.NOT_ATTACHED,
            Reason.BROKER_UNAVAILABLE,
            Reason.DRAINING,
        )
    ),
)
"""How acquisitions end: with every byte from a peer, with a lease to load from disk, because the caller went away, or
with an error."""


class Acquisitions:
    """The acquisitions by id, and their course: wait, be granted a source, wait again, end."""

    def __init__(
        self, publications: Publications, weight_sets: WeightSetIndex, transfers: TransferLog, room: Room
    ) -> None:
        """`room` for the layouts of their receivers."""
        self._room = room
        self._publications = publications
        self._weight_sets = weight_sets
        self._transfers = transfers
        self._open: dict[str, Acquisition] = {}
        self._deadlines: list[tuple[float, str]] = []
        """A heap. An entry stays when its acquisition stops waiting; readers of the heap skip it."""
        self._left_group: list[tuple[Acquisition, str]] = []
        self.ended: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
        """Of this broker's life, by outcome."""

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Acquisition]:
        return iter(list(self._open.values()))

    def __contains__(self, acquisition_id: str) -> bool:
        return acquisition_id in self._open

    def __getitem__(self, acquisition_id: str) -> Acquisition:
        return self._open[acquisition_id]

    def find(self, acquisition_id: str) -> Acquisition | None:
        return self._open.get(acquisition_id)

    @property
    def waiting(self) -> list[Acquisition]:
        """Acquisitions without a transfer, oldest first."""
        return [acquisition for acquisition in self._open.values() if not acquisition.transfer_id]

    def begin(self, acquisition: Acquisition, process: Process) -> None:
        """Add a new acquisition, which waits; raises LIMIT_EXCEEDED where there is no room for its layout."""
        self._room.take(acquisition.acquisition_id, process, acquisition.layout)
        self._open[acquisition.acquisition_id] = acquisition
        self.wait_again(acquisition)

    def wait_again(self, acquisition: Acquisition) -> None:
        """The acquisition has no transfer any more and must be served."""
        acquisition.transfer_id = ""
        self._weight_sets.record(acquisition.key).waiting[acquisition.acquisition_id] = acquisition
        heapq.heappush(self._deadlines, (acquisition.deadline, acquisition.acquisition_id))

    def grant(self, acquisition: Acquisition, publication: Publication, now: float) -> Decisions:
        """Give the acquisition a slot of the source. Its caller gets the grant once the source is reserved."""
        transfer = self._transfers.begin(acquisition, publication, now)
        self._publications.reserve(publication, transfer.reader)
        acquisition.transfer_id = transfer.transfer_id
        acquisition.last_wait = None
        del self._weight_sets.record(acquisition.key).waiting[acquisition.acquisition_id]
        return [Reserve(transfer), TransferChanged(transfer), WeightSetChanged(publication.weight_set_id)]

    def wait(self, acquisition: Acquisition, reason: WaitReason, lease: ColdLoadLease | None) -> Decisions:
        """Send the reason for waiting, unless the caller knows it already."""
        waits_for = (reason, lease.fencing_token if lease is not None else 0)
        if acquisition.last_wait == waits_for:
            return []
        acquisition.last_wait = waits_for
        return [Wait(acquisition.acquisition_id, reason, lease)]

    def complete(self, acquisition: Acquisition, transfer: Transfer, arrival: Arrival) -> Decisions:
        """End the acquisition: every byte is in place."""
        return self._end(acquisition, Complete(acquisition.acquisition_id, transfer, arrival))

    def load_from_disk(self, acquisition: Acquisition, lease: ColdLoadLease) -> Decisions:
        """End the acquisition: its instance has the lease and loads."""
        return self._end(acquisition, LoadFromDisk(acquisition.acquisition_id, lease))

    def fail(self, acquisition: Acquisition, error: BrokerError) -> Decisions:
        """End the acquisition with an error, and note the reason for its group."""
        error.touched = error.touched or acquisition.touched
        decisions = self._end(acquisition, Fail(acquisition.acquisition_id, error))
        if decisions and acquisition.rank is not None:
            self._left_group.append((acquisition, error.message))
        return decisions

    def drop(self, acquisition: Acquisition) -> Decisions:
        self._forget(acquisition)
        self.ended[ABANDONED] += 1
        if acquisition.rank is not None:
            self._left_group.append((acquisition, DROPPED))
        return [WeightSetChanged(acquisition.key.id)]

    def left_group(self) -> list[tuple[Acquisition, str]]:
        """Members of groups that ended before their group since the last call, each with the reason."""
        ended, self._left_group = self._left_group, []
        return ended

    def late(self, now: float) -> list[Acquisition]:
        """Acquisitions that wait although their deadline is over, oldest first."""
        late: set[str] = set()
        while self._deadlines and self._deadlines[0][0] <= now:
            late.add(heapq.heappop(self._deadlines)[1])
        found = [self._open[acquisition_id] for acquisition_id in self._open if acquisition_id in late] if late else []
        return [acquisition for acquisition in found if not acquisition.transfer_id]

    def next_deadline(self) -> float | None:
        """The earliest deadline of a waiting acquisition."""
        while self._deadlines:
            acquisition = self._open.get(self._deadlines[0][1])
            if acquisition is not None and not acquisition.transfer_id:
                return acquisition.deadline
            heapq.heappop(self._deadlines)  # `wait_again` adds it again if its transfer fails
        return None

    def _end(self, acquisition: Acquisition, ending: Ending) -> Decisions:
        if acquisition.acquisition_id not in self._open:
            return []
        self._forget(acquisition)
        self.ended[_outcome(ending)] += 1
        return [ending, WeightSetChanged(acquisition.key.id)]

    def _forget(self, acquisition: Acquisition) -> None:
        self._open.pop(acquisition.acquisition_id, None)
        self._room.give_back(acquisition.acquisition_id)
        record = self._weight_sets.find(acquisition.key.id)
        if record is not None:
            record.waiting.pop(acquisition.acquisition_id, None)
            self._weight_sets.tidy(record.key.id)


def _outcome(ending: Ending) -> str:
    match ending:
        case Complete():
            return TRANSFERRED
        case LoadFromDisk():
            return COLD_LOAD
        case Fail(_, error):
            return error.reason.value.lower()
