"""Acquiring: from an acquire call to its answer, with the transfers in between."""

from __future__ import annotations

from collections.abc import Mapping

from weight_brokerd.control.leasing import Leasing
from weight_brokerd.control.loop import Loop
from weight_brokerd.control.mailboxes import Granted, Mailbox, Mailboxes, Moved
from weight_brokerd.control.movements import Movements
from weight_brokerd.control.publishing import Publishing
from weight_brokerd.core import decisions as decide
from weight_brokerd.core.model import Acquisition, Arrival, DataPlane, FailureCause
from weight_brokerd.core.transfers import Transfer
from weight_brokerd.dataplane.plane import MoveFailed, Place, shown_as
from weight_brokerd.kinds.registry import Kinds
from weight_brokerd.telemetry.audit import audit


class Acquiring:
    """The acquisitions of this host's instances."""

    def __init__(
        self, loop: Loop, kinds: Kinds, publishing: Publishing, leasing: Leasing, movements: Movements
    ) -> None:
        self._loop = loop
        self._kinds = kinds
        self._publishing = publishing
        self._movements = movements
        self._mailboxes = Mailboxes(movements, leasing.give_back, loop.spawn)
        self._destinations: dict[str, Place] = {}
        """Where the broker moves the bytes to, by acquisition."""
        self._reserved: dict[str, bytes] = {}
        """The sources of reserved transfers as their receivers see them: serialized Granted, by transfer."""

    def begin(self, acquisition: Acquisition, destination: Place | None = None) -> Mailbox:
        """Start an acquisition; its answers arrive in the mailbox. `destination`: where the broker moves the bytes to;
        None if the receiver copies."""
        decisions = self._loop.coordinator.acquire(acquisition, self._loop.now())
        if destination is not None:
            self._destinations[acquisition.acquisition_id] = destination
        mailbox = self._mailboxes.open(acquisition.acquisition_id)
        self._loop.carry_out(decisions)
        return mailbox

    def confirm_lease(self, acquisition_id: str) -> None:
        """The caller has received its lease. Until then the lease returns if the call ends."""
        self._mailboxes.confirm_lease(acquisition_id)

    def end_call(self, acquisition_id: str) -> None:
        """The call is over, answered or not: its reader slot is free, and so is a lease that did not reach the
        caller."""
        self._mailboxes.close(acquisition_id)
        self._loop.carry_out(self._loop.coordinator.abandon(acquisition_id, self._loop.now()))
        if self._destinations.pop(acquisition_id, None) is not None:
            self._loop.spawn(self._movements.forget(acquisition_id))

    def succeeded(self, instance_id: str, transfer_id: str, arrival: Arrival) -> None:
        """The receiver reports that it has every byte."""
        core = self._loop.coordinator
        self._loop.carry_out(core.transfer_succeeded(transfer_id, instance_id, arrival, self._loop.now()))

    async def failed(self, instance_id: str, transfer_id: str, cause: FailureCause, detail: str) -> None:
        """The receiver reports a failure. Returns when the broker does not write to the receiver's memory any more."""
        core = self._loop.coordinator
        transfer = core.transfers.running.get(transfer_id)
        decisions = core.transfer_failed(transfer_id, instance_id, cause, detail, self._loop.now())
        who = self._loop.author(instance_id)
        audit("transfer_failed", **who, transfer_id=transfer_id, cause=str(cause), detail=detail)
        self._loop.carry_out(decisions)
        if transfer is not None:
            await self._movements.settled(transfer.acquisition_id)

    def not_reserved(self, transfer: Transfer, why: str) -> None:
        """The broker could not keep the source readable for the transfer, or not begin to move its bytes."""
        decisions = self._loop.coordinator.not_reserved(transfer.transfer_id, why, self._loop.now())
        self._loop.carry_out(decisions)

    # How movements end (weight_brokerd.control.movements.MovementEvents)

    def moved(self, transfer: Transfer, seconds: Mapping[str, float]) -> None:
        decisions = self._loop.coordinator.transfer_moved(transfer.transfer_id, self._loop.now())
        if transfer.is_moved:
            self._mailboxes.post(transfer.acquisition_id, Moved(transfer, seconds))
        self._loop.carry_out(decisions)

    def not_moved(self, transfer: Transfer, failure: MoveFailed) -> None:
        if transfer.transfer_id not in self._loop.coordinator.transfers.running:
            return
        audit("transfer_failed", transfer_id=transfer.transfer_id, cause=str(failure.cause), detail=str(failure))
        self._loop.carry_out(
            self._loop.coordinator.transfer_failed(
                transfer.transfer_id,
                transfer.receiver_instance_id,
                failure.cause,
                str(failure),
                self._loop.now(),
                touched=failure.touched,
                quiesced=failure.quiesced,
                remedy=failure.remedy,
            )
        )

    def routed(self, transfer: Transfer, data_plane: DataPlane) -> None:
        """This data plane begins to move the bytes."""
        self._loop.carry_out(self._loop.coordinator.routed(transfer.transfer_id, data_plane))

    def staged(self, transfer: Transfer) -> None:
        """The receiver copies from now on: the same transfer is granted again, with its new path."""
        destination = self._destinations.get(transfer.acquisition_id)
        if destination is None or transfer.transfer_id not in self._loop.coordinator.transfers.running:
            return
        self._destinations[transfer.acquisition_id] = destination.as_staged
        self._loop.carry_out(self._loop.coordinator.staged(transfer.transfer_id))

    # Ports

    def answer(self, answer: decide.Answer) -> None:
        match answer:
            case decide.Grant(_, transfer):
                self._mailboxes.post_grant(Granted(transfer, self._reserved[transfer.transfer_id]))
            case decide.LoadFromDisk() | decide.Fail():
                self._mailboxes.post_end(answer)
            case decide.Wait(acquisition_id) | decide.Complete(acquisition_id):
                self._mailboxes.post(acquisition_id, answer)

    def reserve(self, transfer: Transfer) -> None:
        publication = transfer.publication
        memory = self._kinds.of(publication.device_kind).grant(transfer)
        # Serialized messages that follow each other are one message with the fields of both.
        self._reserved[transfer.transfer_id] = memory + self._publishing.digests_of(publication)
        data_plane = self._data_plane(transfer)
        self._loop.carry_out(self._loop.coordinator.reserved(transfer.transfer_id, data_plane))

    def move(self, transfer: Transfer) -> None:
        acquisition = self._loop.coordinator.acquisitions.find(transfer.acquisition_id)
        if acquisition is None or acquisition.transfer_id != transfer.transfer_id:
            return  # it ended while this decision was queued
        destination = self._destinations[transfer.acquisition_id]
        timeout = min(acquisition.deadline - self._loop.now(), self._kinds.transfer_seconds)
        self._movements.start(transfer, self._publishing.place_of(transfer.publication), destination, timeout, self)

    def end(self, transfer: Transfer) -> None:
        self._reserved.pop(transfer.transfer_id, None)
        self._movements.stop(transfer)
        self._kinds.of(transfer.publication.device_kind).end(transfer)

    def _data_plane(self, transfer: Transfer) -> DataPlane:
        """What is to move the bytes: the receiver, or what its kind of memory chooses."""
        if not transfer.broker_copies:
            return DataPlane.LOCAL
        destination = self._destinations.get(transfer.acquisition_id)
        if destination is None:  # the call ended while this decision was queued
            return DataPlane.UNKNOWN
        source = self._publishing.place_of(transfer.publication)
        return shown_as(self._kinds.route(source, destination).name, source, destination)
