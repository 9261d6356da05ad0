"""Which source serves an acquisition, and why the others do not."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from weight_broker.layout import Layout, differences
from weight_brokerd.core.model import Publication, PublicationState


class Refusal(enum.StrEnum):
    """Why a source is refused."""

    LAYOUT_DIFFERS = "layout_differs"
    NOT_RESIDENT = "not_resident"
    QUARANTINED = "quarantined"
    BUSY = "busy"
    HOST_UNREACHABLE = "host_unreachable"
    ALREADY_FAILED = "already_failed"
    DEVICE_KIND = "device_kind"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A source, and why it is refused if it is."""

    publication: Publication
    refusal: Refusal | None = None
    detail: str = ""
    is_coming: bool = False
    """Whether it is being mapped, and would do once it is."""


@dataclass(frozen=True, slots=True)
class Receiver:
    """What matters about the receiving side."""

    host_id: str
    device_kind: str
    device_id: str
    layout: Layout | None
    failed_sources: dict[str, str]


@dataclass(frozen=True, slots=True)
class Selection:
    """The candidates, each judged, and the chosen one."""

    candidates: tuple[Candidate, ...]
    chosen: Publication | None

    def has(self, refusal: Refusal) -> bool:
        """True if a candidate was refused for this reason."""
        return any(candidate.refusal is refusal for candidate in self.candidates)

    @property
    def is_coming(self) -> bool:
        """True if a source that would do is being mapped."""
        return any(candidate.is_coming for candidate in self.candidates)


def select(publications: Iterable[Publication], receiver: Receiver) -> Selection:
    """Judges every publication and chooses: same device, then same host, then the one with the fewest readers, then
    the oldest (the longest proven)."""
    candidates = tuple(_judge(publication, receiver) for publication in publications)
    free = [candidate.publication for candidate in candidates if candidate.refusal is None]
    chosen = min(free, key=lambda publication: _rank(publication, receiver), default=None)
    return Selection(candidates, chosen)


def _rank(publication: Publication, receiver: Receiver) -> tuple[bool, bool, int, int]:
    same_host = publication.host_id == receiver.host_id
    same_device = same_host and publication.device_id == receiver.device_id
    return (not same_device, not same_host, len(publication.readers), publication.generation)


def _judge(publication: Publication, receiver: Receiver) -> Candidate:
    if publication.state is PublicationState.QUARANTINED:
        return Candidate(publication, Refusal.QUARANTINED, publication.quarantine_reason)
    if publication.state is not PublicationState.RESIDENT:
        fits = publication.device_kind == receiver.device_kind and (
            receiver.layout is None or publication.layout.fingerprint == receiver.layout.fingerprint
        )
        is_coming = fits and publication.state is PublicationState.REGISTERING
        return Candidate(publication, Refusal.NOT_RESIDENT, f"it is {publication.state}", is_coming)
    if publication.publication_id in receiver.failed_sources:
        return Candidate(publication, Refusal.ALREADY_FAILED, receiver.failed_sources[publication.publication_id])
    if publication.device_kind != receiver.device_kind:
        detail = f"it is in {publication.device_kind} memory, the receiver's is {receiver.device_kind}"
        return Candidate(publication, Refusal.DEVICE_KIND, detail)
    if receiver.layout is not None and publication.layout.fingerprint != receiver.layout.fingerprint:
        detail = "; ".join(differences(publication.layout, receiver.layout))
        return Candidate(publication, Refusal.LAYOUT_DIFFERS, detail)
    if len(publication.readers) >= publication.reader_limit:
        return Candidate(publication, Refusal.BUSY, f"all {publication.reader_limit} reader slots are taken")
    return Candidate(publication)
