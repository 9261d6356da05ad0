"""How transfers and publications end, and what that means for the acquisitions that read from them."""

from __future__ import annotations

from weight_broker.kinds import TRAITS
from weight_brokerd.core import answers
from weight_brokerd.core.acquisitions import Acquisitions
from weight_brokerd.core.decisions import (
    Decisions,
    EndTransfer,
    InstanceChanged,
    Release,
    TransferChanged,
    WeightSetChanged,
)
from weight_brokerd.core.model import Acquisition, FailureCause
from weight_brokerd.core.publications import Publication, Publications, PublicationState
from weight_brokerd.core.transfers import Transfer, TransferLog, TransferState


class Endings:
    """Changes the state, and remembers which weight sets must be served again."""

    def __init__(self, publications: Publications, transfers: TransferLog, acquisitions: Acquisitions) -> None:
        self._publications = publications
        self._transfers = transfers
        self._acquisitions = acquisitions
        self._touched: dict[str, None] = {}

    def touch(self, *weight_set_ids: str) -> None:
        """Something changed for the acquisitions that wait for the weight sets."""
        self._touched.update(dict.fromkeys(weight_set_ids))

    def next_touched(self) -> str | None:
        """Remove and return the weight set that was touched first; None if there is none."""
        weight_set_id = next(iter(self._touched), None)
        if weight_set_id is not None:
            del self._touched[weight_set_id]
        return weight_set_id

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
        """The transfer failed; a source that delivered wrong bytes is quarantined."""
        publication = transfer.publication
        decisions = self.end_transfer(transfer, TransferState.FAILED, detail or cause, now)
        if cause is FailureCause.DIGEST_MISMATCH:
            self._acquisitions[transfer.acquisition_id].saw_wrong_bytes = True
            if publication.state is not PublicationState.GONE:
                decisions += self.quarantine(publication, f"delivered wrong bytes in {transfer.transfer_id}: {detail}")
        return decisions

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
