"""Transfers: reserved, running and recently ended."""

from __future__ import annotations

import enum
import itertools
from collections import Counter, deque
from dataclasses import dataclass

from weight_broker.errors import Reason, from_reason
from weight_broker.kinds import TRAITS
from weight_brokerd.core.model import Acquisition, DataPlane, TransferPath
from weight_brokerd.core.publications import Publication
from weight_brokerd.core.sources import Holder, Reader


class TransferState(enum.StrEnum):
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class TransferRecord:
    """What is listed of a transfer. It keeps neither the publication nor the layout in memory."""

    number: int
    acquisition_id: str
    weight_set_id: str
    publication_id: str
    generation: int
    source_instance_id: str
    receiver_instance_id: str
    path: TransferPath
    data_plane: DataPlane
    state: TransferState
    fingerprint: str
    size_bytes: int
    started_at: float
    ended_at: float
    failure: str

    @property
    def transfer_id(self) -> str:
        return f"transfer-{self.number}"


@dataclass(slots=True)
class Transfer:
    """The movement of one weight set into one instance of this host."""

    number: int
    """Grows with every transfer of this broker."""
    acquisition_id: str
    publication: Publication
    """The source; it may be gone before the transfer ends, if its instance dies."""
    receiver: Holder
    path: TransferPath
    data_plane: DataPlane
    """What moves the bytes now, or moved them; told by whoever routes the transfer."""
    started_at: float
    is_moved: bool = False
    """Whether the broker has moved every byte; the receiver verifies them."""
    state: TransferState = TransferState.RUNNING
    ended_at: float = 0.0
    failure: str = ""

    @property
    def transfer_id(self) -> str:
        return f"transfer-{self.number}"

    @property
    def reader(self) -> Reader:
        """The owner of the transfer's slot of the source."""
        return Reader(self.receiver.host_id, self.transfer_id)

    @property
    def receiver_instance_id(self) -> str:
        return self.receiver.instance_id

    @property
    def broker_copies(self) -> bool:
        """Whether the broker moves the bytes; if not, the receiver does."""
        return TRAITS[self.publication.device_kind].broker_copies

    @property
    def record(self) -> TransferRecord:
        """The transfer at this moment."""
        source = self.publication
        return TransferRecord(
            number=self.number,
            acquisition_id=self.acquisition_id,
            weight_set_id=source.weight_set_id,
            publication_id=source.publication_id,
            generation=source.generation,
            source_instance_id=source.instance_id,
            receiver_instance_id=self.receiver_instance_id,
            path=self.path,
            data_plane=self.data_plane,
            state=self.state,
            fingerprint=source.fingerprint,
            size_bytes=source.layout.content_bytes,
            started_at=self.started_at,
            ended_at=self.ended_at,
            failure=self.failure,
        )


class TransferLog:
    """Running transfers by id, and records of the last ended transfers."""

    def __init__(self, host_id: str, remembered: int) -> None:
        self._host_id = host_id
        self._numbers = itertools.count(1)
        self._ended: deque[TransferRecord] = deque(maxlen=remembered)
        self.running: dict[str, Transfer] = {}
        self.succeeded: Counter[DataPlane] = Counter()
        """Of this broker's life, by what moved the bytes."""

    def begin(self, acquisition: Acquisition, publication: Publication, now: float) -> Transfer:
        receiver = Holder(self._host_id, acquisition.instance_id)
        transfer = Transfer(
            number=next(self._numbers),
            acquisition_id=acquisition.acquisition_id,
            publication=publication,
            receiver=receiver,
            path=_path(publication, acquisition),
            data_plane=DataPlane.UNKNOWN,
            started_at=now,
        )
        self.running[transfer.transfer_id] = transfer
        return transfer

    def of_receiver(self, transfer_id: str, instance_id: str) -> Transfer:
        """The running transfer that fills this instance; raises TRANSFER_NOT_FOUND."""
        transfer = self.running.get(transfer_id)
        if transfer is None or transfer.receiver_instance_id != instance_id:
            raise from_reason(
                Reason.TRANSFER_NOT_FOUND,
                f"no transfer {transfer_id!r} runs for this instance",
                metadata={"transfer_id": transfer_id},
            )
        return transfer

    def end(self, transfer: Transfer, state: TransferState, failure: str, now: float) -> None:
        del self.running[transfer.transfer_id]
        transfer.state, transfer.failure, transfer.ended_at = state, failure, now
        self._ended.append(transfer.record)
        if state is TransferState.SUCCEEDED:
            self.succeeded[transfer.data_plane] += 1

    def newest_first(self, *, running_only: bool = False) -> list[TransferRecord]:
        """All known transfers, the newest first: an order that stays when a transfer ends."""
        known = [transfer.record for transfer in self.running.values()]
        if not running_only:
            known += self._ended
        return sorted(known, key=lambda record: record.number, reverse=True)


def _path(publication: Publication, acquisition: Acquisition) -> TransferPath:
    if publication.device_kind != acquisition.device_kind:  # the receiver copies into its own memory
        return TransferPath.COPY
    return TransferPath.STAGED if publication.is_staged else acquisition.path
