"""What is resident on this host: publications, their states and their readers.

The registry is the only authority on whether a publication may be read now. A publication's state changes only along
`TRANSITIONS`, its generation never repeats, and a reader is let in only while it is resident and has a free slot.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from weight_broker.errors import PublicationNotFound, Reason, from_reason
from weight_brokerd.core.model import Offer, Publication, PublicationState

TRANSITIONS: dict[PublicationState, frozenset[PublicationState]] = {
    PublicationState.REGISTERING: frozenset({PublicationState.RESIDENT, PublicationState.GONE}),
    PublicationState.RESIDENT: frozenset(
        {PublicationState.RETRACTING, PublicationState.QUARANTINED, PublicationState.GONE}
    ),
    PublicationState.RETRACTING: frozenset({PublicationState.GONE}),
    PublicationState.QUARANTINED: frozenset({PublicationState.RETRACTING, PublicationState.GONE}),
    PublicationState.GONE: frozenset(),
}


class Registry:
    """All publications of this host that are not gone."""

    def __init__(self, *, host_id: str, first_generation: int, limit: int, readers_per_publication: int) -> None:
        self._host_id = host_id
        self._generations = itertools.count(first_generation)
        self._limit = limit
        self._readers_per_publication = readers_per_publication
        self._publications: dict[str, Publication] = {}
        self._by_weight_set: dict[str, dict[str, Publication]] = {}
        self._by_instance: dict[str, dict[str, Publication]] = {}
        self._by_request: dict[tuple[str, str], str] = {}

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
        """The publication, or None."""
        return self._publications.get(publication_id)

    def of_weight_set(self, weight_set_id: str) -> tuple[Publication, ...]:
        """Publications of a weight set, oldest first."""
        return tuple(self._by_weight_set.get(weight_set_id, {}).values())

    def of_instance(self, instance_id: str) -> tuple[Publication, ...]:
        """Publications of an instance, oldest first."""
        return tuple(self._by_instance.get(instance_id, {}).values())

    def count_of_instance(self, instance_id: str) -> int:
        """Number of publications of an instance."""
        return len(self._by_instance.get(instance_id, {}))

    def of_request(self, instance_id: str, request_id: str) -> Publication | None:
        """The publication that this request of this instance made, if it is not gone."""
        publication_id = self._by_request.get((instance_id, request_id))
        return self._publications.get(publication_id) if publication_id else None

    def add(self, offer: Offer, *, instance_name: str, now: float) -> Publication:
        """A new publication in state registering; raises at the limit."""
        if len(self._publications) >= self._limit:
            raise from_reason(
                Reason.LIMIT_EXCEEDED,
                f"this broker already has {self._limit} publications; raise limits.publications or retract some",
                metadata={"limit": "limits.publications", "value": str(self._limit)},
            )
        generation = next(self._generations)
        publication = Publication(
            publication_id=f"publication-{generation}",
            key=offer.key,
            layout=offer.layout,
            generation=generation,
            instance_id=offer.instance_id,
            instance_name=instance_name,
            host_id=self._host_id,
            device_kind=offer.device_kind,
            device_id=offer.device_id,
            reader_limit=self._readers_per_publication,
            published_at=now,
            request_id=offer.request_id,
            fencing_token=offer.fencing_token,
            rank=offer.rank,
            is_staged=offer.is_staged,
        )
        self._publications[publication.publication_id] = publication
        self._by_weight_set.setdefault(publication.weight_set_id, {})[publication.publication_id] = publication
        self._by_instance.setdefault(offer.instance_id, {})[publication.publication_id] = publication
        self._by_request[offer.instance_id, offer.request_id] = publication.publication_id
        return publication

    def move(self, publication: Publication, state: PublicationState) -> None:
        """Changes the state along `TRANSITIONS`; a publication that becomes gone leaves the registry."""
        if state not in TRANSITIONS[publication.state]:
            raise AssertionError(f"{publication.publication_id}: {publication.state} -> {state} is not a transition")
        publication.state = state
        if state is PublicationState.GONE:
            self._remove(publication)

    def reserve(self, publication: Publication, transfer_id: str) -> None:
        """Lets a reader in; the caller has just selected the publication among the readable ones."""
        if publication.state is not PublicationState.RESIDENT or len(publication.readers) >= publication.reader_limit:
            raise AssertionError(f"{publication.publication_id} is {publication.state} or full: not readable")
        publication.readers.add(transfer_id)

    def release(self, publication: Publication, transfer_id: str) -> None:
        """Lets a reader out. The publication may be gone already: its instance died while it was read."""
        publication.readers.discard(transfer_id)

    def _remove(self, publication: Publication) -> None:
        del self._publications[publication.publication_id]
        _drop(self._by_weight_set, publication.weight_set_id, publication.publication_id)
        _drop(self._by_instance, publication.instance_id, publication.publication_id)
        self._by_request.pop((publication.instance_id, publication.request_id), None)


def _drop(index: dict[str, dict[str, Publication]], key: str, publication_id: str) -> None:
    members = index[key]
    del members[publication_id]
    if not members:
        del index[key]
