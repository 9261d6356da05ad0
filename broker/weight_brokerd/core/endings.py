"""How transfers and publications end, and what that means for the acquisitions that read from them."""

from __future__ import annotations

from collections.abc import Mapping

from weight_broker.kinds import TRAITS
from weight_brokerd.core import answers
from weight_brokerd.core.acquisitions import Acquisitions
from weight_brokerd.core.conduct.damage import DamageReports
from weight_brokerd.core.decisions import (
    Decisions,
    EndTransfer,
    InstanceChanged,
    Release,
    TransferChanged,
    WeightSetChanged,
)
from weight_brokerd.core.model import Acquisition, DamageReport, FailureCause, Finding, Instance
from weight_brokerd.core.publications import Publication, Publications, PublicationState
from weight_brokerd.core.transfers import Transfer, TransferLog, TransferState


class Endings:
    """Changes the state, and remembers which weight sets must be served again."""

    def __init__(
        self,
        publications: Publications,
        transfers: TransferLog,
        acquisitions: Acquisitions,
        instances: Mapping[str, Instance],
    ) -> None:
        self.damage = DamageReports(publications, instances)
        self._instances = instances
        self._publications = publications
        self._transfers = transfers
        self._acquisitions = acquisitions
        self._touched: dict[str, list[Acquisition] | None] = {}
        """Weight sets, each with the acquisitions for which something changed; None stands for all that wait."""

    def touch(self, *weight_set_ids: str) -> None:
        """Something changed for the acquisitions that wait for the weight sets."""
        self._touched.update(dict.fromkeys(weight_set_ids))

    def touch_newcomer(self, acquisition: Acquisition) -> None:
        """An acquisition has begun. It changes nothing for those who wait: thousands of them are not judged again."""
        newcomers = self._touched.setdefault(acquisition.key.id, [])
        if acquisition.rank is not None:
            self.touch(acquisition.key.id)
        elif newcomers is not None:
            newcomers.append(acquisition)

    def next_touched(self) -> tuple[str, list[Acquisition] | None] | None:
        """Remove and return the weight set that was touched first; None if there is none."""
        weight_set_id = next(iter(self._touched), None)
        return None if weight_set_id is None else (weight_set_id, self._touched.pop(weight_set_id))

    def end_transfer(self, transfer: Transfer, state: TransferState, failure: str, now: float) -> Decisions:
        """The transfer is over; its slot of the source is free."""
        self._transfers.end(transfer, state, failure, now)
        return [EndTransfer(transfer), TransferChanged(transfer), *self.free_slot(transfer)]

    def free_slot(self, transfer: Transfer) -> Decisions:
        """The transfer does not read its source any more."""
        publication = transfer.publication
        if transfer.reader not in publication.readers:
            return []
        self._publications.release(publication, transfer.reader)
        self.touch(publication.weight_set_id)
        if publication.state is PublicationState.RETRACTING and not publication.readers:
            return self.end_publication(publication)
        return [WeightSetChanged(publication.weight_set_id)]

    def fail_transfer(self, transfer: Transfer, cause: FailureCause, detail: str, now: float) -> Decisions:
        """The transfer failed; a source that is said to have delivered wrong bytes is checked."""
        publication = transfer.publication
        decisions = self.end_transfer(transfer, TransferState.FAILED, detail or cause, now)
        if cause is not FailureCause.DIGEST_MISMATCH:
            return decisions
        self._acquisitions[transfer.acquisition_id].saw_wrong_bytes = True
        if publication.state is PublicationState.GONE:
            return decisions
        receiver = self._instances[transfer.receiver_instance_id]
        report = DamageReport(transfer.transfer_id, receiver.instance_id, receiver.process, receiver.gid, detail)
        return [*decisions, *self.damage.add(publication, report, now), WeightSetChanged(publication.weight_set_id)]

    def judge_damage(self, publication: Publication, finding: Finding, detail: str, now: float) -> Decisions:
        """A check of the publication's content has ended."""
        decisions = self.damage.checked(publication, finding, now)
        if self.damage.must_quarantine(publication, finding):
            decisions += self.quarantine(publication, detail)
        return [*decisions, WeightSetChanged(publication.weight_set_id)]

    def try_next(self, transfer: Transfer, cause: FailureCause, detail: str, now: float) -> Decisions:
        """The source failed: the acquisition waits for another source, unless its deadline is over."""
        acquisition = self._acquisitions[transfer.acquisition_id]
        decisions = self.fail_transfer(transfer, cause, detail, now)
        self.touch(acquisition.key.id)
        if transfer.broker_copies and acquisition.deadline <= now:
            return decisions + self._acquisitions.fail(acquisition, answers.late(acquisition, now))
        acquisition.failed_sources[transfer.publication.ref] = f"{cause}: {detail}"
        self._acquisitions.wait_again(acquisition)
        return decisions

    def drop(self, acquisition: Acquisition, now: float) -> Decisions:
        """Ends an acquisition whose caller is gone."""
        decisions: Decisions = []
        transfer = self._transfers.running.get(acquisition.transfer_id)
        if transfer is not None:
            decisions += self.end_transfer(transfer, TransferState.FAILED, "the receiver went away", now)
        if transfer is not None or acquisition.rank is not None:  # else it was one that waited, and nothing is free now
            self.touch(acquisition.key.id)
        return decisions + self._acquisitions.drop(acquisition)

    def quarantine(self, publication: Publication, reason: str) -> Decisions:
        """The publication is never read again, but stays in listings."""
        if publication.state is PublicationState.RESIDENT:
            self._publications.move(publication, PublicationState.QUARANTINED)
            publication.quarantine_reason = reason
        self.touch(publication.weight_set_id)
        return [WeightSetChanged(publication.weight_set_id)]

    def end_publication(self, publication: Publication, why: str = "", now: float = 0.0) -> Decisions:
        """The publication is gone. Readers of memory that outlives its owner read on; the acquisitions of other readers
        wait for another source."""
        self._publications.move(publication, PublicationState.GONE)
        self.damage.forget_publication(publication)
        self.touch(publication.weight_set_id)
        decisions: Decisions = []
        if not TRAITS[publication.device_kind].outlives_owner:
            for reader in sorted(publication.readers):
                decisions += self._lose_source(self._transfers.running[reader.reader_id], why, now)
        return [
            *decisions,
            Release(publication),
            WeightSetChanged(publication.weight_set_id),
            InstanceChanged(publication.instance_id),
        ]

    def _lose_source(self, transfer: Transfer, why: str, now: float) -> Decisions:
        acquisition = self._acquisitions[transfer.acquisition_id]
        acquisition.touched = True
        acquisition.failed_sources[transfer.publication.ref] = why
        self._acquisitions.wait_again(acquisition)
        return self.end_transfer(transfer, TransferState.FAILED, why, now)
