"""Selects the source of an acquisition, and says why the others were refused."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from weight_broker.layout import Layout
from weight_brokerd.core.model import Acquisition
from weight_brokerd.core.sources import Refusal, Source, SourceRef

S = TypeVar("S", bound=Source)


@dataclass(frozen=True, slots=True)
class Candidate(Generic[S]):
    """A source, and why it is refused if it is."""

    source: S
    refusal: Refusal | None = None
    why: str = ""
    is_coming: bool = False
    """Whether the source fits, but is not readable yet."""
    other_layout: Layout | None = None
    """The receiver's, if that is why the source is refused."""

    @property
    def detail(self) -> str:
        """For people. What differs between large layouts takes long to find, so it is found when it is shown."""
        return self.why if self.other_layout is None else self.source.differences(self.other_layout)


@dataclass(frozen=True, slots=True)
class Receiver:
    """What matters about the receiving side."""

    host_id: str
    device_kind: str
    device_id: str
    layout: Layout | None
    """None accepts any layout."""
    failed_sources: dict[SourceRef, str]
    other_kinds: frozenset[str] = frozenset()
    """Kinds of memory besides its own from which it fills itself."""

    @classmethod
    def of(cls, acquisition: Acquisition, host_id: str) -> Receiver:
        """The receiving side of an acquisition on this host."""
        return cls(
            host_id,
            acquisition.device_kind,
            acquisition.device_id,
            acquisition.layout,
            acquisition.failed_sources,
            acquisition.other_kinds,
        )

    @property
    def likeness(self) -> Hashable:
        """Equal for receivers that every source serves, or refuses, alike."""
        fingerprint = self.layout.fingerprint if self.layout is not None else None
        kinds = self.device_kind, self.other_kinds
        return self.host_id, kinds, self.device_id, fingerprint, frozenset(self.failed_sources)

    def takes(self, device_kind: str) -> bool:
        """Whether memory of this kind can fill the receiver's."""
        return device_kind == self.device_kind or device_kind in self.other_kinds


@dataclass(frozen=True, slots=True)
class Selection(Generic[S]):
    """The candidates, each judged, and the chosen source."""

    candidates: tuple[Candidate[S], ...]
    chosen: S | None

    def has(self, refusal: Refusal) -> bool:
        """True if a candidate was refused for this reason."""
        return any(candidate.refusal is refusal for candidate in self.candidates)

    @property
    def is_coming(self) -> bool:
        """True if a source that fits is not readable yet."""
        return any(candidate.is_coming for candidate in self.candidates)

    @property
    def refusals(self) -> set[Refusal | None]:
        """Why no source was chosen; None stands for no candidate at all."""
        return {candidate.refusal for candidate in self.candidates} or {None}


def select(sources: Iterable[S], receiver: Receiver) -> Selection[S]:
    """Judges every source and chooses: one that contradicts no older one, then the same kind of memory, then same
    device, then same host, then the source's own `preference`."""
    candidates = tuple(_judge(source, receiver) for source in sources)
    free = [candidate.source for candidate in candidates if candidate.refusal is None]
    return Selection(candidates, min(free, key=lambda source: _rank(source, receiver), default=None))


def _rank(source: Source, receiver: Receiver) -> tuple[bool, bool, bool, bool, tuple[int, int]]:
    other_kind = source.device_kind != receiver.device_kind
    same_host = source.ref.host_id == receiver.host_id
    same_device = same_host and source.device_id == receiver.device_id
    return (bool(source.contradicts), other_kind, not same_device, not same_host, source.preference)


def _judge(source: S, receiver: Receiver) -> Candidate[S]:
    if source.unreadable is not None:
        return Candidate(source, *source.unreadable, is_coming=source.is_coming and _fits(source, receiver))
    if source.ref in receiver.failed_sources:
        return Candidate(source, Refusal.ALREADY_FAILED, receiver.failed_sources[source.ref])
    if not receiver.takes(source.device_kind):
        detail = f"it is in {source.device_kind} memory, the receiver's is {receiver.device_kind}"
        return Candidate(source, Refusal.DEVICE_KIND, detail)
    if receiver.layout is not None and not _fits(source, receiver):
        return Candidate(source, Refusal.LAYOUT_DIFFERS, other_layout=receiver.layout)
    if source.busy:
        return Candidate(source, Refusal.BUSY, source.busy)
    return Candidate(source)


def _fits(source: Source, receiver: Receiver) -> bool:
    is_same_layout = receiver.layout is None or source.fingerprint == receiver.layout.fingerprint
    return is_same_layout and receiver.takes(source.device_kind)
