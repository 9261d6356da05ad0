"""What the daemon does with one kind of memory. A kind is a folder beside this file and a row of `TRAITS`.

Called by `api`: ready, place. By `control`: hold, release, grant, check, end, route. By `daemon`: start, close. Host
memory is a kind like the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from weight_brokerd.cards.health import CardHealth
from weight_brokerd.core.model import Finding
from weight_brokerd.core.publications import Publication
from weight_brokerd.core.transfers import Transfer
from weight_brokerd.dataplane.plane import DataPlane, Place
from weight_brokerd.kinds.place_request import PlaceRequest


@dataclass(frozen=True, slots=True)
class WorkerHealth:
    """A datasystem worker that a kind depends on."""

    address: str
    is_reachable: bool
    is_managed: bool
    """Whether the broker started it."""
    problem: str


@dataclass(frozen=True, slots=True)
class KindHealth:
    """One kind, as listings and health checks show it."""

    devices: Sequence[CardHealth] = ()
    """Every device that was found; none for host memory."""
    problem: str = ""
    """Why no device can be served; empty if all is well."""
    region_count: int = 0
    region_bytes: int = 0
    """Bytes of published regions."""
    workers: Sequence[WorkerHealth] = ()

    @property
    def device_ids(self) -> frozenset[str]:
        """The physical identities of the devices."""
        return frozenset(device.identity for device in self.devices)


@dataclass(frozen=True, slots=True)
class ContentCheck:
    """How a check has ended."""

    finding: Finding
    detail: str
    """For people: which tensors differ, or why nothing was read."""


UNREAD = ContentCheck(Finding.UNCHECKED, "the broker does not read memory of this kind")


class KindEvents(Protocol):
    """What a kind reports. Called on the loop."""

    def memory_lost(self, kind: str, publication_ids: Iterable[str], why: str) -> None:
        """Published memory became unreachable."""

    def health_changed(self) -> None:
        """`health` has changed."""


class Kind(Protocol):
    """One kind of memory: its devices, its publications, its data planes."""

    @property
    def name(self) -> str:
        """A row of `weight_broker.kinds.TRAITS`."""

    @property
    def is_served(self) -> bool:
        """False once this host is known to have no such device, unless the settings ask for one."""

    @property
    def health(self) -> KindHealth:
        """The kind's health now."""

    def start(self) -> None:
        """Begin to look for devices. Returns at once."""

    async def ready(self) -> None:
        """Return when the devices are known. Raises `BrokerUnavailable` if the settings ask for devices and none
        serves."""

    def place(self, request: PlaceRequest) -> Place:
        """Check where tensors lie, or are to lie; after `ready`. Raises `InvalidArgument` and `request.refusal`."""

    def hold(self, publication: Publication, place: Place) -> asyncio.Future[Place]:
        """Begin to make the memory readable. The result is the place that is held: mapped or staged, not both. The
        future is done at once if no wait is needed; cancelling it gives up. `release` follows in every case. Raises
        `PublishRefused` and others, at once or by the future."""

    async def release(self, publication_id: str) -> None:
        """The owner may free or change the memory when this returns. Idempotent. Raises `RetractTimeout`: then the
        memory is still held, and the next call tries again."""

    def grant(self, transfer: Transfer) -> bytes:
        """The source's memory for the receiver: a serialized Granted without digests. Keeps the memory readable until
        `end`. Raises BrokerError if it is not readable any more."""

    async def check(self, publication: Publication, digests: bytes) -> ContentCheck:
        """Compare the content of a resident publication with the digests, a serialized Granted. Takes as long as the
        content is large; cancelling it ends the reading."""

    def end(self, transfer: Transfer) -> None:
        """The transfer no longer needs the source. Idempotent."""

    def route(self, source: Place, destination: Place) -> DataPlane:
        """The data plane for two places. Not called where the receiver copies."""

    async def close(self) -> None:
        """End all processes and tasks of the kind. Nothing may move any more."""
