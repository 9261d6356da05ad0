"""Publications become resident when their memory is held, and are gone when it is released.

Where a device has to map and unmap the memory both take a while, and both can fail. An instance that is told that its
publication is gone may free the memory. Host memory is held at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import structlog

from weight_broker.errors import PublicationNotFound, RetractTimeout
from weight_brokerd.core.model import Publication
from weight_brokerd.dataplane.plane import Place
from weight_brokerd.kinds.registry import Kinds

log = structlog.get_logger()


@dataclass(slots=True)
class _Residency:
    publication: Publication
    holding: asyncio.Future[Place]
    releasing: asyncio.Task[None] | None = None


class Residency:
    """All publications whose memory is held, being made readable or being released."""

    def __init__(
        self,
        kinds: Kinds,
        readers_gone: Callable[[Publication], Awaitable[None]],
        on_held: Callable[[Publication, Place], None],
        on_refused: Callable[[Publication], None],
    ) -> None:
        """`readers_gone` returns when no transfer that was ended reads the publication any more: a receiver that copies
        within a card has it mapped too. `on_refused` leads to `release`, as every end of a publication does."""
        self._kinds = kinds
        self._readers_gone = readers_gone
        self._on_held = on_held
        self._on_refused = on_refused
        self._all: dict[str, _Residency] = {}

    def hold(self, publication: Publication, place: Place) -> None:
        """Begin to make the memory readable; `held` says how that ends. Calls `on_held` or `on_refused` before it
        returns where nothing has to be waited for."""
        holding = self._begin_hold(publication, place)
        self._all[publication.publication_id] = _Residency(publication, holding)
        if holding.done():
            self._ended(publication, holding)
        else:
            holding.add_done_callback(partial(self._ended, publication))

    async def held(self, publication_id: str) -> None:
        """Return when the memory is held. Raises `PublishRefused` and others if it cannot be, `PublicationNotFound` if
        the publication ended meanwhile."""
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

    def release(self, publication: Publication) -> None:
        """Begin to give the memory up; `released` says how that ends."""
        residency = self._all.get(publication.publication_id)
        if residency is None:
            return
        residency.holding.cancel()
        self._begin_release(residency)

    def is_releasing(self, instance_id: str, publication_id: str) -> bool:
        """Whether the publication was this instance's and its memory is still held."""
        residency = self._all.get(publication_id)
        return (
            residency is not None
            and residency.releasing is not None
            and residency.publication.instance_id == instance_id
        )

    async def released(self, publication_id: str) -> None:
        """Return when the memory is held no longer. Raises `RetractTimeout` if the driver does not let go; the next
        call tries again."""
        residency = self._all.get(publication_id)
        if residency is None or residency.releasing is None:
            return
        if residency.releasing.done():
            self._begin_release(residency)
        await asyncio.shield(residency.releasing)

    def publication(self, publication_id: str) -> Publication:
        """A publication that `is_releasing`."""
        return self._all[publication_id].publication

    async def close(self) -> None:
        """Wait for what is under way. The processes that hold the rest are about to end."""
        under_way = {task for entry in self._all.values() for task in (entry.holding, entry.releasing) if task}
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)

    def _begin_hold(self, publication: Publication, place: Place) -> asyncio.Future[Place]:
        try:
            return self._kinds.of(place.kind).hold(publication, place)
        except Exception as error:  # noqa: BLE001 - `held` raises it; also after a defect the publication must not stay
            refused: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
            refused.set_exception(error)
            return refused

    def _ended(self, publication: Publication, holding: asyncio.Future[Place]) -> None:
        if holding.cancelled():
            return
        if holding.exception() is not None:
            self._on_refused(publication)
        else:
            self._on_held(publication, holding.result())

    def _begin_release(self, residency: _Residency) -> None:
        residency.releasing = asyncio.get_running_loop().create_task(self._release(residency))
        residency.releasing.add_done_callback(_retrieved)

    async def _release(self, residency: _Residency) -> None:
        publication = residency.publication
        await asyncio.wait({residency.holding})
        await self._readers_gone(publication)
        try:
            await self._kinds.of(publication.device_kind).release(publication.publication_id)
        except RetractTimeout:
            raise
        except Exception:
            log.exception("internal_error", publication_id=publication.publication_id)
        del self._all[publication.publication_id]


def _retrieved(task: asyncio.Task[None]) -> None:
    """Marks the exception as retrieved: a task without a waiter is normal here."""
    if not task.cancelled():
        task.exception()
