"""Sources: weight sets that can be read, wherever they are; and who holds and who reads them.

Ids are counted by each broker on its own: only with the host beside it does an id name one thing in a cluster.
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
    """Who keeps the bytes of a source, or has a lease: an instance, or the host itself."""

    host_id: str
    instance_id: str = ""
    """Empty if the host holds it."""
    name: str = field(default="", compare=False)
    """For people."""

    @property
    def is_host(self) -> bool:
        """Whether the bytes outlive every instance."""
        return not self.instance_id


@dataclass(frozen=True, slots=True, order=True)
class Reader:
    """Who has a slot of a source: a transfer of its own host, or a read by another one."""

    host_id: str
    reader_id: str


class Source(Protocol):
    """What selection judges."""

    @property
    def ref(self) -> SourceRef:
        """Its name in the cluster."""

    @property
    def holder(self) -> Holder:
        """Who keeps the bytes."""

    @property
    def device_kind(self) -> str:
        """Kind of the memory that the bytes lie in."""

    @property
    def device_id(self) -> str:
        """Device on the holder's host; empty where the kind has none."""

    @property
    def fingerprint(self) -> str:
        """Of its layout."""

    @property
    def unreadable(self) -> tuple[Refusal, str] | None:
        """Why no receiver can read it now, with a detail for people; None if one can."""

    @property
    def is_coming(self) -> bool:
        """Whether it becomes readable without anybody doing anything."""

    @property
    def busy(self) -> str:
        """Why it takes no further reader now; empty if it does."""

    @property
    def preference(self) -> tuple[int, int]:
        """Among equals the smaller is chosen: fewer readers, then the longer proven."""

    def differences(self, layout: Layout) -> str:
        """In what its layout differs from another one."""
