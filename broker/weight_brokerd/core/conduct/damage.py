"""Reports of damage: claims until a check has read the memory.

A report keeps its receiver's process and the source apart, and has the source checked; meanwhile the source serves
others, which verify for themselves. Only a source that fails the check is quarantined. Where no check is possible, the
reports of two independent witnesses take its place. A process whose reports a check disproves again and again is
suspect: the broken memory may be its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from weight_brokerd.core.decisions import CheckContent, DamageJudged, Decisions, InstanceChanged
from weight_brokerd.core.model import DamageReport, Finding, Instance, Process
from weight_brokerd.core.publications import Publication, Publications
from weight_brokerd.core.sources import SourceRef

FALSE_REPORTS_OF_A_SUSPECT = 3
WITNESSES = 2
CHECK_HOLDS_SECONDS = 60.0
"""How long a check that found the content intact answers further reports. Published memory is sealed: only broken
hardware changes it."""

Witness = Process | int
"""A process of the publisher's user, or any other user as a whole: one user cannot multiply itself by forking."""


class DamageReports:
    """The reports about publications of this host, and what became of them."""

    def __init__(self, publications: Publications, instances: Mapping[str, Instance]) -> None:
        self._publications = publications
        self._instances = instances
        self._apart: dict[Process, dict[SourceRef, str]] = {}
        self._open: dict[str, list[DamageReport]] = {}
        """Reports that wait for a check, by publication."""
        self._intact_until: dict[str, float] = {}
        self._witnesses: dict[str, set[Witness]] = {}
        self._false: Counter[Process] = Counter()
        self.judged: Counter[Finding] = Counter()
        """Reports of this broker's life, by what the check found."""

    @property
    def suspects(self) -> int:
        """Processes that are suspect."""
        return sum(count >= FALSE_REPORTS_OF_A_SUSPECT for count in self._false.values())

    def is_being_checked(self, publication: Publication) -> bool:
        return publication.publication_id in self._open

    def false_reports(self, process: Process) -> int:
        """Reports of the process that a check has disproved."""
        return self._false[process]

    def is_suspect(self, process: Process) -> bool:
        return self._false[process] >= FALSE_REPORTS_OF_A_SUSPECT

    def apart_from(self, process: Process) -> dict[SourceRef, str]:
        """Sources that this process does not read again, each with the reason."""
        return dict(self._apart.get(process, {}))

    def add(self, publication: Publication, report: DamageReport, now: float) -> Decisions:
        """A receiver reports damage. The first report has the publication checked, unless that was done just now."""
        why = f"this process reported wrong bytes in {report.transfer_id}: {report.detail}"
        self._apart.setdefault(report.process, {})[publication.ref] = why
        publication_id = publication.publication_id
        if publication_id in self._open:
            self._open[publication_id].append(report)
            return []
        if now < self._intact_until.get(publication_id, now):
            return self._judge(publication, [report], Finding.INTACT)
        self._open[publication_id] = [report]
        return [CheckContent(publication)]

    def checked(self, publication: Publication, finding: Finding, now: float) -> Decisions:
        """The check has ended. `must_quarantine` says what follows for the publication."""
        reports = self._open.pop(publication.publication_id, [])
        if finding is Finding.INTACT:
            self._intact_until[publication.publication_id] = now + CHECK_HOLDS_SECONDS
        return self._judge(publication, reports, finding)

    def must_quarantine(self, publication: Publication, finding: Finding) -> bool:
        """Whether what is known suffices to quarantine the publication."""
        witnesses = self._witnesses.get(publication.publication_id, ())
        return finding is Finding.DAMAGED or (finding is Finding.UNCHECKED and len(witnesses) >= WITNESSES)

    def forget_publication(self, publication: Publication) -> None:
        """The publication is gone."""
        self._open.pop(publication.publication_id, None)
        self._intact_until.pop(publication.publication_id, None)
        self._witnesses.pop(publication.publication_id, None)
        for sources in self._apart.values():
            sources.pop(publication.ref, None)

    def forget_instance(self, instance: Instance) -> None:
        """An instance has departed. With the last one of its process what is known of the process goes too."""
        process = instance.process
        is_known = process in self._apart or process in self._false
        if is_known and all(other.process != process for other in self._instances.values()):
            self._apart.pop(process, None)
            self._false.pop(process, None)

    def _judge(self, publication: Publication, reports: list[DamageReport], finding: Finding) -> Decisions:
        for report in reports:
            self.judged[finding] += 1
            if report.instance_id not in self._instances:
                continue
            if finding is Finding.INTACT:
                self._false[report.process] += 1
            elif finding is Finding.UNCHECKED and not self.is_suspect(report.process):
                self._witnesses.setdefault(publication.publication_id, set()).add(self._witness(report, publication))
        is_quarantined = self.must_quarantine(publication, finding)
        decisions: Decisions = []
        for report in reports:
            is_suspect = self.is_suspect(report.process)
            decisions.append(DamageJudged(report, publication, finding, is_quarantined, is_suspect))
            decisions.append(InstanceChanged(report.instance_id))
        return decisions

    def _witness(self, report: DamageReport, publication: Publication) -> Witness:
        publisher = self._instances.get(publication.instance_id)
        same_user = publisher is not None and publisher.uid == report.process.uid
        return report.process if same_user else report.process.uid
