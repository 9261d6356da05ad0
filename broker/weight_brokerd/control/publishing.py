"""Publishing: from an instance's offer to a source, and back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from weight_brokerd.attach.stage import StagingConnections
from weight_brokerd.control.loop import Loop
from weight_brokerd.control.movements import Movements
from weight_brokerd.control.residency import Residency
from weight_brokerd.core.publications import Offer, Publication
from weight_brokerd.dataplane.plane import Place
from weight_brokerd.kinds.published import PublishedMemory
from weight_brokerd.kinds.registry import Kinds
from weight_brokerd.telemetry.audit import audit


class Publishing:
    """The publications of this host's instances, and their memory."""

    def __init__(self, loop: Loop, kinds: Kinds, movements: Movements, staging: StagingConnections) -> None:
        self._loop = loop
        self._staging = staging
        self._residency = Residency(kinds, movements.readers_gone, self)
        self._offered: dict[str, PublishedMemory] = {}
        self._gone: dict[str, asyncio.Event] = {}

    async def publish(self, offer: Offer, memory: PublishedMemory) -> Publication:
        """Offer a weight set; it is resident when this returns. Raises `PublishRefused` and others."""
        publication, decisions = self._loop.coordinator.publish(offer, self._loop.now())
        if decisions:
            self._offered[publication.publication_id] = memory
            audit(
                "publish",
                instance_id=offer.instance_id,
                publication_id=publication.publication_id,
                weight_set_id=publication.weight_set_id,
                generation=publication.generation,
                size_bytes=publication.layout.content_bytes,
            )
            if publication.contradicts:
                self._audit_contradiction(publication)
            self._loop.carry_out(decisions)
        await self._residency.held(publication.publication_id)
        return publication

    def _audit_contradiction(self, publication: Publication) -> None:
        other = self._loop.coordinator.publications.find(publication.contradicts)
        audit(
            "contradict_publication",
            **self._loop.author(publication.instance_id),
            publication_id=publication.publication_id,
            weight_set_id=publication.weight_set_id,
            contradicts=publication.contradicts,
            publisher=other.instance_id if other is not None else "",
        )

    async def retract(self, instance_id: str, publication_id: str) -> Publication:
        """Withdraw a publication; return when nothing reads it and its memory is released."""
        residency = self._residency
        if residency.is_releasing(instance_id, publication_id):
            publication = residency.publication(publication_id)
            await residency.released(publication_id)
            return publication
        publication, decisions = self._loop.coordinator.retract(instance_id, publication_id, self._loop.now())
        audit("retract", instance_id=instance_id, publication_id=publication_id)
        gone = self._gone.setdefault(publication_id, asyncio.Event())
        self._loop.carry_out(decisions)
        await gone.wait()
        await residency.released(publication_id)
        return publication

    def evict(self, instance_id: str, publication_id: str) -> Publication:
        """Take a publication out of service without waiting for readers; `instance_id` is the administrator's."""
        publication, decisions = self._loop.coordinator.evict(publication_id, self._loop.now())
        audit("evict", **self._loop.author(instance_id), publication_id=publication_id)
        self._loop.carry_out(decisions)
        return publication

    def quarantine(self, instance_id: str, publication_id: str, reason: str) -> Publication:
        """Set a publication aside; `instance_id` is the administrator's."""
        publication, decisions = self._loop.coordinator.quarantine(publication_id, reason, self._loop.now())
        audit("quarantine", **self._loop.author(instance_id), publication_id=publication_id, reason=reason)
        self._loop.carry_out(decisions)
        return publication

    def memory_lost(self, publication_ids: Iterable[str], why: str) -> None:
        """Published memory became unreachable."""
        for publication_id in publication_ids:
            audit("lose_publication", publication_id=publication_id, why=why)
            self._loop.carry_out(self._loop.coordinator.lose(publication_id, why, self._loop.now()))

    def staging_lost(self, instance_id: str, reason: str) -> None:
        """An instance does not copy for staged transfers any more."""
        publications = self._loop.coordinator.publications.of_instance(instance_id)
        staged = [publication.publication_id for publication in publications if publication.is_staged]
        self.memory_lost(staged, f"its instance does not copy for staged transfers any more: {reason}")

    def place_of(self, publication: Publication) -> Place:
        """The place of a resident publication's weights."""
        return self._residency.place_of(publication)

    def digests_of(self, publication: Publication) -> bytes:
        """The digests of the content, as a serialized Granted."""
        return self._offered[publication.publication_id].digests

    async def close(self) -> None:
        """Cancel holding and releasing."""
        await self._residency.close()

    # How holding ends (weight_brokerd.control.residency.ResidencyEvents)

    def held(self, publication: Publication, place: Place) -> None:
        is_staged = place.stage is not None
        self._loop.carry_out(self._loop.coordinator.held(publication, self._loop.now(), is_staged=is_staged))
        if is_staged and not self._staging.has(publication.instance_id):
            self.staging_lost(publication.instance_id, "its stage connection has ended")

    def not_held(self, publication: Publication) -> None:
        self._loop.carry_out(self._loop.coordinator.not_held(publication, self._loop.now()))

    # Ports

    def hold(self, publication: Publication) -> None:
        self._residency.hold(publication, self._offered[publication.publication_id].place)

    def release(self, publication: Publication) -> None:
        self._offered.pop(publication.publication_id, None)
        gone = self._gone.pop(publication.publication_id, None)
        if gone is not None:
            gone.set()
        self._residency.release(publication)
