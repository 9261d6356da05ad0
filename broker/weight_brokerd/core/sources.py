"""Sources: weight sets that can be read, on this host or another, with their holders and readers.

Each broker counts its ids for itself: an id names one thing in a cluster only together with its host.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Protocol

from weight_broker.layout import Layout


class Refusal(enum.StrEnum):
    """Why a source does not serve a receiver."""

    LAYOUT_DIFFERS = "layout_differs"
    NOT_RESIDENT = "not_resident"
    QUARANTINED = "quarantined"
    BUSY = "busy"
    HOST_UNREACHABLE = "host_unreachable"
    ALREADY_FAILED = "already_failed"
    DEVICE_KIND = "device_kind"


@dataclass(frozen=True, slots=True, order=True)
class SourceRef:
    """Names a source in the whole cluster."""

    host_id: str
    source_id: str


@dataclass(frozen=True, slots=True)
class Holder:
    """The keeper of a source's bytes, or the owner of a lease: an instance, or the host itself."""

    host_id: str
    instance_id: str = ""
    """Empty for the host itself."""
    name: str = field(default="", compare=False)
    """For people."""

    @property
    def is_host(self) -> bool:
        """Whether the bytes outlive every instance."""
        return not self.instance_id


@dataclass(frozen=True, slots=True, order=True)
class Reader:
    """The owner of a slot of a source: a transfer of this host, or a read by another host."""

    host_id: str
    reader_id: str


class Source(Protocol):
    """What selection judges."""

    @property
    def ref(self) -> SourceRef:
        """The source's name in the cluster."""

    @property
    def holder(self) -> Holder:
        """Keeper of the bytes."""

    @property
    def device_kind(self) -> str:
        """Kind of the memory that the bytes lie in."""

    @property
    def device_id(self) -> str:
        """Device on the holder's host; empty where the kind has none."""

    @property
    def fingerprint(self) -> str:
        """Of the layout."""

    @property
    def unreadable(self) -> tuple[Refusal, str] | None:
        """Why no receiver can read the source now, with a detail for people; None if receivers can."""

    @property
    def is_coming(self) -> bool:
        """Whether the source becomes readable by itself."""

    @property
    def busy(self) -> str:
        """Why the source takes no further reader now; empty if it does."""

    @property
    def contradicts(self) -> str:
        """An older source of the same key and layout with other content; empty if there was none. Such a source serves
        where no other can."""

    @property
    def preference(self) -> tuple[int, int]:
        """The smaller is chosen among equals: fewer readers first, then older publications."""

    def differences(self, layout: Layout) -> str:
        """How the source's layout differs from another layout."""
