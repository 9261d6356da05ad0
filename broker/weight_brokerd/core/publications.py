"""What is resident on this host: publications, their states and their readers.

`Publications` is the only authority on whether a publication may be read now. A publication's state changes only along
`TRANSITIONS`, its generation never repeats, and a reader is let in only while it is resident and has a free slot.
"""

from __future__ import annotations

import enum
import itertools
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from weight_broker.errors import PublicationNotFound, Reason, from_reason
from weight_broker.key import WeightSetKey
from weight_broker.layout import Layout, differences
from weight_brokerd.core.model import Instance, Limits, Process, RankOfGroup
from weight_brokerd.core.sources import Holder, Reader, Refusal, SourceRef

Key = TypeVar("Key")
STORY_LENGTH = 16


class PublicationState(enum.StrEnum):
    """State of a publication; `TRANSITIONS` has the edges."""

    REGISTERING = "registering"
    RESIDENT = "resident"
    RETRACTING = "retracting"
    GONE = "gone"
    QUARANTINED = "quarantined"


TRANSITIONS: dict[PublicationState, frozenset[PublicationState]] = {
    PublicationState.REGISTERING: frozenset({PublicationState.RESIDENT, PublicationState.GONE}),
    PublicationState.RESIDENT: frozenset(
        {PublicationState.RETRACTING, PublicationState.QUARANTINED, PublicationState.GONE}
    ),
    PublicationState.RETRACTING: frozenset({PublicationState.GONE}),
    PublicationState.QUARANTINED: frozenset({PublicationState.RETRACTING, PublicationState.GONE}),
    PublicationState.GONE: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Offer:
    """A request to publish, validated."""

    key: WeightSetKey
    layout: Layout
    instance_id: str
    device_kind: str
    device_id: str
    fencing_token: int
    request_id: str
    rank: RankOfGroup | None = None
    content: Mapping[str, str] = field(default_factory=dict)
    """What identifies the content, by kind of digest: equal contents have equal values of each kind that both have."""


@dataclass(slots=True)
class Publication:
    """A weight set that is offered as a source on this host. See `weight_brokerd.core.sources.Source`."""

    publication_id: str
    key: WeightSetKey
    layout: Layout
    generation: int
    holder: Holder
    device_kind: str
    device_id: str
    reader_limit: int
    published_at: float
    request_id: str
    fencing_token: int
    """Of the cold-load lease that the publication fulfils; 0 if none."""
    state: PublicationState = PublicationState.REGISTERING
    readers: set[Reader] = field(default_factory=set)
    is_staged: bool = False
    """Whether its instance copies the bytes, because the broker does not map their memory."""
    served_count: int = 0
    quarantine_reason: str = ""
    rank: RankOfGroup | None = None
    """None unless the instance's engine has several ranks."""
    content: Mapping[str, str] = field(default_factory=dict)
    contradicts: str = ""
    """An older publication of the same key and layout with other content; empty if there was none."""
    story: deque[PublicationState] = field(default_factory=lambda: deque(maxlen=STORY_LENGTH))
    """The states before this one."""

    @property
    def ref(self) -> SourceRef:
        return SourceRef(self.holder.host_id, self.publication_id)

    @property
    def instance_id(self) -> str:
        """The instance that holds it; empty if the host does."""
        return self.holder.instance_id

    @property
    def group_id(self) -> str:
        """The instance's engine; empty unless it has several ranks."""
        return self.rank.group_id if self.rank is not None else ""

    @property
    def weight_set_id(self) -> str:
        return self.key.id

    @property
    def fingerprint(self) -> str:
        return self.layout.fingerprint

    @property
    def unreadable(self) -> tuple[Refusal, str] | None:
        """Why no receiver can read the publication now, with a detail for people; None if receivers can."""
        if self.state is PublicationState.QUARANTINED:
            return Refusal.QUARANTINED, self.quarantine_reason
        if self.state is not PublicationState.RESIDENT:
            return Refusal.NOT_RESIDENT, f"it is {self.state}"
        return None

    @property
    def is_coming(self) -> bool:
        """Whether its memory is being made readable."""
        return self.state is PublicationState.REGISTERING

    @property
    def busy(self) -> str:
        """Why the publication takes no further reader now; empty if it does."""
        is_full = len(self.readers) >= self.reader_limit
        return f"all {self.reader_limit} reader slots are occupied" if is_full else ""

    @property
    def preference(self) -> tuple[int, int]:
        """Fewer readers first, then older publications."""
        return len(self.readers), self.generation

    def differences(self, layout: Layout) -> str:
        """How its layout differs from another layout."""
        return "; ".join(differences(self.layout, layout))


class Room(Protocol):
    """For layouts; see `weight_brokerd.core.conduct.layouts.LayoutRoom`."""

    def take(self, holder: str, process: Process, layout: Layout | None) -> None:
        """The publication or acquisition holds this layout from now on. Raises LIMIT_EXCEEDED, and then it does not."""

    def give_back(self, holder: str) -> None:
        """The holder is gone. Idempotent."""


class Publications:
    """All publications of this host that are not gone."""

    def __init__(self, host_id: str, limits: Limits, room: Room, *, first_generation: int) -> None:
        """`room` for their layouts."""
        self._host_id = host_id
        self._room = room
        self._generations = itertools.count(first_generation)
        self._limit = limits.publications
        self._readers_per_publication = limits.readers_per_publication
        self._publications: dict[str, Publication] = {}
        self._by_weight_set: dict[str, dict[str, Publication]] = {}
        self._by_holder: dict[Holder, dict[str, Publication]] = {}
        self._by_request: dict[tuple[str, str], str] = {}
        self.changes = 0
        """Grows with every change that may change a selection."""

    def __len__(self) -> int:
        return len(self._publications)

    def __iter__(self) -> Iterator[Publication]:
        return iter(self._publications.values())

    def get(self, publication_id: str) -> Publication:
        """The publication; raises `PublicationNotFound`."""
        publication = self._publications.get(publication_id)
        if publication is None:
            raise PublicationNotFound(
                f"publication {publication_id!r} does not exist or is gone",
                metadata={"publication_id": publication_id},
            )
        return publication

    def find(self, publication_id: str) -> Publication | None:
        return self._publications.get(publication_id)

    def held_by(self, holder: Holder, publication_id: str) -> Publication:
        """The publication, if this holder has it; raises `PublicationNotFound`."""
        publication = self._publications.get(publication_id)
        if publication is None or publication.holder != holder:
            raise PublicationNotFound(
                f"this instance has no publication {publication_id!r}; it is gone or belongs to another instance",
                metadata={"publication_id": publication_id},
            )
        return publication

    def of_weight_set(self, weight_set_id: str) -> tuple[Publication, ...]:
        """Publications of a weight set, oldest first."""
        return tuple(self._by_weight_set.get(weight_set_id, {}).values())

    def of_instance(self, instance_id: str) -> tuple[Publication, ...]:
        """Publications that an instance of this host holds, oldest first."""
        return tuple(self._by_holder.get(Holder(self._host_id, instance_id), {}).values())

    def count_of_instance(self, instance_id: str) -> int:
        return len(self._by_holder.get(Holder(self._host_id, instance_id), {}))

    def of_request(self, offer: Offer) -> Publication | None:
        """The publication of the same request; None if there is none or it is gone. Raises INVALID_ARGUMENT if the
        request's id was used for another one."""
        publication_id = self._by_request.get((offer.instance_id, offer.request_id))
        earlier = self._publications.get(publication_id) if publication_id else None
        if earlier is not None and (earlier.key, earlier.fingerprint) != (offer.key, offer.layout.fingerprint):
            raise from_reason(
                Reason.INVALID_ARGUMENT,
                f"request_id {offer.request_id!r} was used for another publication; use a new one",
                metadata={"field": "request_id"},
            )
        return earlier

    def add(self, offer: Offer, instance: Instance, *, now: float) -> Publication:
        """A new publication in state registering; raises at the limits."""
        if len(self._publications) >= self._limit:
            raise from_reason(
                Reason.LIMIT_EXCEEDED,
                f"this broker already has {self._limit} publications; raise limits.publications or retract some",
                metadata={"limit": "limits.publications", "value": str(self._limit)},
            )
        generation = next(self._generations)
        publication_id = f"publication-{generation}"
        self._room.take(publication_id, instance.process, offer.layout)
        publication = Publication(
            publication_id=publication_id,
            key=offer.key,
            layout=offer.layout,
            generation=generation,
            holder=Holder(self._host_id, offer.instance_id, instance.name),
            device_kind=offer.device_kind,
            device_id=offer.device_id,
            reader_limit=self._readers_per_publication,
            published_at=now,
            request_id=offer.request_id,
            fencing_token=offer.fencing_token,
            rank=offer.rank,
            content=offer.content,
            contradicts=self._contradicted_by(offer),
        )
        self._publications[publication.publication_id] = publication
        self._by_weight_set.setdefault(publication.weight_set_id, {})[publication.publication_id] = publication
        self._by_holder.setdefault(publication.holder, {})[publication.publication_id] = publication
        self._by_request[offer.instance_id, offer.request_id] = publication.publication_id
        self.changes += 1
        return publication

    def move(self, publication: Publication, state: PublicationState) -> None:
        """Changes the state along `TRANSITIONS`; a publication that is gone is removed."""
        if state not in TRANSITIONS[publication.state]:
            story = " -> ".join([*publication.story, publication.state])
            raise AssertionError(f"{publication.publication_id}: {state} does not follow {story}")
        publication.story.append(publication.state)
        publication.state = state
        self.changes += 1
        if state is PublicationState.GONE:
            self._remove(publication)

    def reserve(self, publication: Publication, reader: Reader) -> None:
        """Adds a reader; the caller has just selected the publication among the readable sources."""
        if publication.unreadable is not None or publication.busy:
            raise AssertionError(f"{publication.publication_id} is {publication.state} or full: not readable")
        publication.readers.add(reader)
        self.changes += 1

    def release(self, publication: Publication, reader: Reader) -> None:
        """Removes a reader. The publication may be gone already: its instance died during the read."""
        publication.readers.discard(reader)
        self.changes += 1
        self._give_room_back(publication)

    def _contradicted_by(self, offer: Offer) -> str:
        for other in self.of_weight_set(offer.key.id):
            is_same_layout = other.fingerprint == offer.layout.fingerprint
            if is_same_layout and other.state is not PublicationState.QUARANTINED and not other.contradicts:
                both = offer.content.keys() & other.content.keys()
                if any(offer.content[kind] != other.content[kind] for kind in both):
                    return other.publication_id
        return ""

    def _remove(self, publication: Publication) -> None:
        del self._publications[publication.publication_id]
        _drop(self._by_weight_set, publication.weight_set_id, publication.publication_id)
        _drop(self._by_holder, publication.holder, publication.publication_id)
        self._by_request.pop((publication.instance_id, publication.request_id), None)
        self._give_room_back(publication)

    def _give_room_back(self, publication: Publication) -> None:
        """Transfers that read on after their source is gone still need its layout."""
        if publication.state is PublicationState.GONE and not publication.readers:
            self._room.give_back(publication.publication_id)


def _drop(index: dict[Key, dict[str, Publication]], key: Key, publication_id: str) -> None:
    members = index[key]
    del members[publication_id]
    if not members:
        del index[key]
