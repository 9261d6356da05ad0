"""Checking: reports of damage, from the claim to what the check of the content finds."""

from __future__ import annotations

import asyncio

import structlog

from weight_brokerd.control.loop import Loop
from weight_brokerd.control.publishing import Publishing
from weight_brokerd.core.decisions import DamageJudged
from weight_brokerd.core.model import Finding
from weight_brokerd.core.publications import Publication
from weight_brokerd.kinds.kind import ContentCheck
from weight_brokerd.kinds.registry import Kinds
from weight_brokerd.telemetry.audit import audit

log = structlog.get_logger()


class Checking:
    """At most one check of each publication at a time."""

    def __init__(self, loop: Loop, kinds: Kinds, publishing: Publishing) -> None:
        self._loop = loop
        self._kinds = kinds
        self._publishing = publishing
        self._running: dict[str, asyncio.Task[None]] = {}

    def stop(self, publication: Publication) -> None:
        """The publication is gone: its memory is not read any more."""
        task = self._running.pop(publication.publication_id, None)
        if task is not None:
            task.cancel()

    async def close(self) -> None:
        """Stop all checks, and wait until nothing is read."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def not_checked(self, publication: Publication, why: str) -> None:
        """The check could not begin."""
        self._checked(publication, ContentCheck(Finding.UNCHECKED, why))

    # Ports

    def check(self, publication: Publication) -> None:
        """Begin to compare the content with its digests."""
        audit("check_content", publication_id=publication.publication_id, weight_set_id=publication.weight_set_id)
        work = self._check(publication, self._publishing.digests_of(publication))
        self._running[publication.publication_id] = asyncio.get_running_loop().create_task(work)

    def judged(self, judged: DamageJudged) -> None:
        """Record what came of a report."""
        report = judged.report
        audit(
            "judge_damage_report",
            instance_id=report.instance_id,
            pid=int(report.process.name) if report.process.name.isdecimal() else 0,
            uid=report.process.uid,
            gid=report.gid,
            transfer_id=report.transfer_id,
            publication_id=judged.publication.publication_id,
            publisher=judged.publication.instance_id,
            detail=report.detail,
            finding=str(judged.finding),
            quarantined=judged.is_quarantined,
        )
        if judged.is_suspect:
            log.warning("receiver_suspect", instance_id=report.instance_id, pid=report.process.name)

    async def _check(self, publication: Publication, digests: bytes) -> None:
        try:
            found = await self._kinds.of(publication.device_kind).check(publication, digests)
        except Exception as error:  # of any kind: the reports must not wait for ever
            log.exception("check_failed", publication_id=publication.publication_id)
            found = ContentCheck(Finding.UNCHECKED, f"the content could not be read: {error}")
        self._running.pop(publication.publication_id, None)
        self._checked(publication, found)

    def _checked(self, publication: Publication, found: ContentCheck) -> None:
        now = self._loop.now()
        self._loop.carry_out(self._loop.coordinator.checked(publication, found.finding, found.detail, now))
