"""Weight sets that an instance holds, loads or waits for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from weight_broker.errors import LeaseLost
from weight_broker.key import WeightSetKey
from weight_brokerd.core.model import Acquisition, ColdLoadLease
from weight_brokerd.core.publications import Publications
from weight_brokerd.core.sources import Holder

UNPUBLISHABLE_REMEMBERED = 256


@dataclass(slots=True)
class WeightSetRecord:
    """One weight set, without its publications."""

    key: WeightSetKey
    waiting: dict[str, Acquisition] = field(default_factory=dict)
    """Acquisitions without a running transfer, first come first."""
    lease: ColdLoadLease | None = None
    """The cold-load lease in the directory's last answer."""
    claim_pending: str | None = None
    """The acquisition for which the directory has been asked for the lease."""
    unpublishable: str = ""
    """Why the weight set cannot be published, in its last loader's words; empty if it can."""


class WeightSetIndex:
    """The records, by id and by model. A record lives as long as its weight set is published, leased or waited for, or
    among the last that were declared unpublishable."""

    def __init__(self, publications: Publications) -> None:
        self._publications = publications
        self._records: dict[str, WeightSetRecord] = {}
        self._by_model: dict[str, set[str]] = {}
        self._unpublishable: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[WeightSetRecord]:
        return iter(self._records.values())

    def ids(self) -> list[str]:
        """All ids, sorted."""
        return sorted(self._records)

    def find(self, weight_set_id: str) -> WeightSetRecord | None:
        return self._records.get(weight_set_id)

    def record(self, key: WeightSetKey) -> WeightSetRecord:
        """The record; a new one if there is none."""
        record = self._records.get(key.id)
        if record is None:
            record = self._records[key.id] = WeightSetRecord(key)
            self._by_model.setdefault(key.model, set()).add(key.id)
        return record

    def of_model(self, model: str) -> list[WeightSetRecord]:
        """The records of one model, by id."""
        return [self._records[weight_set_id] for weight_set_id in sorted(self._by_model.get(model, ()))]

    def note_unpublishable(self, key: WeightSetKey, why: str) -> None:
        """Remember why the weight set cannot be published; an empty text if it has been. The oldest are forgotten."""
        record = self.record(key)
        record.unpublishable = why
        self._unpublishable.pop(key.id, None)
        if why:
            self._unpublishable[key.id] = None
            while len(self._unpublishable) > UNPUBLISHABLE_REMEMBERED:
                oldest, _ = self._unpublishable.popitem(last=False)
                self._records[oldest].unpublishable = ""
                self.tidy(oldest)

    def end_claim(self, weight_set_id: str) -> tuple[WeightSetRecord, Acquisition | None]:
        """The directory has answered: the record, and the acquisition that asked if it still waits."""
        record = self._records.get(weight_set_id)
        if record is None or record.claim_pending is None:
            raise AssertionError(f"no claim is pending for weight set {weight_set_id}")
        claimant, record.claim_pending = record.waiting.get(record.claim_pending), None
        return record, claimant

    def lease_held_by(self, holder: Holder, weight_set_id: str, fencing_token: int) -> ColdLoadLease:
        """The lease of a weight set, if this holder has it with this token; raises `LeaseLost`."""
        record = self._records.get(weight_set_id)
        lease = record.lease if record is not None else None
        if lease is None or (lease.holder, lease.fencing_token) != (holder, fencing_token):
            raise LeaseLost(
                f"this instance does not hold cold-load lease {fencing_token} of weight set {weight_set_id!r}",
                metadata={"weight_set_id": weight_set_id, "fencing_token": str(fencing_token)},
            )
        return lease

    def tidy(self, weight_set_id: str) -> None:
        """Remove the record if its weight set is not published, leased or waited for any more."""
        record = self._records.get(weight_set_id)
        if record is None or record.waiting or record.lease is not None or record.claim_pending is not None:
            return
        if record.unpublishable:
            return
        if self._publications.of_weight_set(weight_set_id):
            return
        del self._records[weight_set_id]
        ids = self._by_model[record.key.model]
        ids.discard(weight_set_id)
        if not ids:
            del self._by_model[record.key.model]
