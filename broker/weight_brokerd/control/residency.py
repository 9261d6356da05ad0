"""Publications become resident when their memory is held, and are gone when it is released.

Both can take a while, and both can fail. An instance may free the memory once `released` has returned.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import structlog

from weight_broker.errors import PublicationNotFound, RetractTimeout
from weight_brokerd.core.publications import Publication
from weight_brokerd.dataplane.plane import Place
from weight_brokerd.kinds.registry import Kinds

log = structlog.get_logger()


class ResidencyEvents(Protocol):
    """How holding ends. Either may be called before `Residency.hold` returns."""

    def held(self, publication: Publication, place: Place) -> None:
        """The memory is readable, at `place`."""

    def not_held(self, publication: Publication) -> None:
        """The memory cannot be made readable; `Residency.held` says why."""


@dataclass(slots=True)
class _Residency:
    publication: Publication
    place: Place
    holding: asyncio.Future[Place]
    releasing: asyncio.Task[None] | None = None


class Residency:
    """All publications, of all kinds of memory, that are held, being held or being released."""

    def __init__(
        self, kinds: Kinds, readers_gone: Callable[[Publication], Awaitable[None]], events: ResidencyEvents
    ) -> None:
        """`readers_gone` returns when nothing moves out of a publication's memory any more: a receiver that copies
        within a card has the memory mapped too."""
        self._kinds = kinds
        self._readers_gone = readers_gone
        self._events = events
        self._all: dict[str, _Residency] = {}

    def hold(self, publication: Publication, place: Place) -> None:
        """Begin to make the memory readable; `held` returns or raises when that has ended."""
        holding = self._begin_to_hold(publication, place)
        self._all[publication.publication_id] = _Residency(publication, place, holding)
        if holding.done():
            self._ended(publication, holding)
        else:
            holding.add_done_callback(lambda ended: self._ended(publication, ended))

    async def held(self, publication_id: str) -> None:
        """Return when the memory is readable. Raises the kind's error if it cannot be; `PublicationNotFound` if the
        publication was retracted meanwhile."""
        residency = self._all.get(publication_id)
        if residency is None:
            return
        await asyncio.wait({residency.holding})
        if residency.holding.cancelled():
            raise PublicationNotFound(
                f"publication {publication_id} ended before its memory was mapped",
                metadata={"publication_id": publication_id},
            )
        residency.holding.result()

    def place_of(self, publication: Publication) -> Place:
        """The place of a resident publication's weights."""
        return self._all[publication.publication_id].place

    def release(self, publication: Publication) -> None:
        """Begin to release the memory; `released` returns or raises when that has ended."""
        residency = self._all.get(publication.publication_id)
        if residency is not None:
            residency.holding.cancel()
            self._begin_to_release(residency)

    def is_releasing(self, instance_id: str, publication_id: str) -> bool:
        """Whether the publication of this instance is gone and its memory still held."""
        residency = self._all.get(publication_id)
        return (
            residency is not None
            and residency.releasing is not None
            and residency.publication.instance_id == instance_id
        )

    async def released(self, publication_id: str) -> None:
        """Return when the memory is not held any more. Raises `RetractTimeout` if the driver does not let go; the
        next call tries again."""
        residency = self._all.get(publication_id)
        if residency is None or residency.releasing is None:
            return
        if residency.releasing.done():
            self._begin_to_release(residency)
        await asyncio.shield(residency.releasing)

    def publication(self, publication_id: str) -> Publication:
        """The publication; only while `is_releasing`."""
        return self._all[publication_id].publication

    async def close(self) -> None:
        """Cancel holding and releasing, and wait for both. The processes that hold the other memory end next."""
        pending: list[asyncio.Future[Place] | asyncio.Task[None]] = []
        for residency in self._all.values():
            pending += [residency.holding, *([residency.releasing] if residency.releasing is not None else [])]
        for future in pending:
            future.cancel()
        await asyncio.gather(*pending, return_exceptions=True)

    def _begin_to_hold(self, publication: Publication, place: Place) -> asyncio.Future[Place]:
        try:
            return self._kinds.of(publication.device_kind).hold(publication, place)
        except Exception as error:  # noqa: BLE001 - the publisher must get the error, of any kind
            failed: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
            failed.set_exception(error)
            return failed

    def _ended(self, publication: Publication, holding: asyncio.Future[Place]) -> None:
        if holding.cancelled():
            return
        if holding.exception() is not None:
            self._events.not_held(publication)
            return
        place = holding.result()
        self._all[publication.publication_id].place = place
        self._events.held(publication, place)

    def _begin_to_release(self, residency: _Residency) -> None:
        residency.releasing = asyncio.get_running_loop().create_task(self._release(residency))
        residency.releasing.add_done_callback(_mark_retrieved)

    async def _release(self, residency: _Residency) -> None:
        publication = residency.publication
        await asyncio.wait({residency.holding})
        await self._readers_gone(publication)
        try:
            await self._kinds.of(publication.device_kind).release(publication.publication_id)
        except RetractTimeout as error:
            log.error("memory_not_released", publication_id=publication.publication_id, error=str(error))
            raise
        del self._all[publication.publication_id]


def _mark_retrieved(task: asyncio.Task[None]) -> None:
    """Mark the exception as retrieved: a task without a waiter is normal here."""
    if not task.cancelled():
        task.exception()
