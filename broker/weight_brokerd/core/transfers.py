"""Transfers: those that run, and the last ones that ended."""

from __future__ import annotations

import itertools
from collections import deque

from weight_broker.kinds import TRAITS, Reach
from weight_brokerd.core.model import (
    Acquisition,
    DataPlane,
    Publication,
    Transfer,
    TransferPath,
    TransferState,
)


class TransferLog:
    """Running transfers by id, ended ones for a while."""

    def __init__(self, remembered: int) -> None:
        self._numbers = itertools.count(1)
        self._ended: deque[Transfer] = deque(maxlen=remembered)
        self.running: dict[str, Transfer] = {}

    def begin(self, acquisition: Acquisition, publication: Publication, now: float) -> Transfer:
        """A new running transfer."""
        transfer = Transfer(
            number=next(self._numbers),
            acquisition_id=acquisition.acquisition_id,
            publication=publication,
            receiver_instance_id=acquisition.instance_id,
            path=TransferPath.STAGED if publication.is_staged else acquisition.path,
            data_plane=data_plane_between(publication, acquisition),
            started_at=now,
        )
        self.running[transfer.transfer_id] = transfer
        return transfer

    def end(self, transfer: Transfer, state: TransferState, failure: str, now: float) -> None:
        """The transfer has ended."""
        del self.running[transfer.transfer_id]
        transfer.state, transfer.failure, transfer.ended_at = state, failure, now
        self._ended.append(transfer)

    def newest_first(self, *, running_only: bool = False) -> list[Transfer]:
        """All that are known, the last one begun first: an order that does not change when one of them ends."""
        known = [*self.running.values(), *([] if running_only else self._ended)]
        return sorted(known, key=lambda transfer: transfer.number, reverse=True)


def data_plane_between(publication: Publication, acquisition: Acquisition) -> DataPlane:
    """What moves the bytes: a copy within a device, between processes of one host's memory, and between its GPUs."""
    is_within = TRAITS[publication.device_kind].copies_within is Reach.HOST
    copied = is_within or publication.device_id == acquisition.device_id
    return DataPlane.LOCAL if copied else DataPlane.DATASYSTEM
