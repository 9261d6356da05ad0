"""The answers to each acquisition, in order.

An answer that lets a receiver use its memory - an error, a cold load, a source that it copies from itself - is posted
once nothing writes to that memory any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass

from weight_broker.errors import TransferFailed
from weight_brokerd.control.movements import Movements
from weight_brokerd.core import decisions as decide
from weight_brokerd.core.model import ColdLoadLease
from weight_brokerd.core.transfers import Transfer


@dataclass(frozen=True, slots=True)
class Granted:
    """A source is reserved for an acquisition; its memory is held for the transfer."""

    transfer: Transfer
    message: bytes
    """The source's memory and digests for the receiver, as a serialized Granted."""


@dataclass(frozen=True, slots=True)
class Moved:
    """The broker has moved every byte; the receiver must verify them."""

    transfer: Transfer
    seconds: Mapping[str, float]
    """By phase."""


AcquisitionEvent = Granted | Moved | decide.Wait | decide.LoadFromDisk | decide.Complete | decide.Fail
Mailbox = asyncio.Queue[AcquisitionEvent]


_STILL_WRITTEN = "a failed transfer may still write to the memory"


class Mailboxes:
    """The mailboxes, one for each acquisition whose call is open."""

    def __init__(
        self,
        movements: Movements,
        release_lease: Callable[[ColdLoadLease], None],
        spawn: Callable[[Coroutine[None, None, None]], None],
    ) -> None:
        """`release_lease` gives back a lease that did not reach its caller; `spawn` runs a task in the background."""
        self._movements = movements
        self._release_lease = release_lease
        self._spawn = spawn
        self._open: dict[str, Mailbox] = {}
        self._unconfirmed: dict[str, ColdLoadLease] = {}
        """Leases that may not have reached their caller yet, by acquisition."""

    def open(self, acquisition_id: str) -> Mailbox:

        mailbox = self._open[acquisition_id] = Mailbox()
        return mailbox

    def close(self, acquisition_id: str) -> None:
        """The call is over; a lease that did not reach the caller goes back."""
        self._open.pop(acquisition_id, None)
        lease = self._unconfirmed.pop(acquisition_id, None)
        if lease is not None:
            self._release_lease(lease)

    def confirm_lease(self, acquisition_id: str) -> None:
        """The caller has received its lease. Until then the lease returns if the call ends."""
        self._unconfirmed.pop(acquisition_id, None)

    def post(self, acquisition_id: str, event: AcquisitionEvent) -> None:
        """Post an answer at once."""
        mailbox = self._open.get(acquisition_id)
        if mailbox is not None:
            mailbox.put_nowait(event)

    def post_grant(self, grant: Granted) -> None:
        """Post a source. One that the receiver copies from comes once nothing else writes to its memory."""
        acquisition_id = grant.transfer.acquisition_id
        if grant.transfer.broker_copies:
            self.post(acquisition_id, grant)
        else:
            self._when_settled(acquisition_id, lambda: self._post_source(acquisition_id, grant))

    def post_end(self, decision: decide.LoadFromDisk | decide.Fail) -> None:
        """Post the last answer once nothing writes to the receiver's memory any more."""
        if isinstance(decision, decide.LoadFromDisk):
            self._unconfirmed[decision.acquisition_id] = decision.lease
        self._when_settled(decision.acquisition_id, lambda: self._post_outcome(decision))

    def _when_settled(self, acquisition_id: str, post: Callable[[], None]) -> None:
        movements = self._movements
        if not movements.is_moving(acquisition_id):
            post()
            return

        async def wait() -> None:
            await movements.settled(acquisition_id)
            post()

        self._spawn(wait())

    def _post_source(self, acquisition_id: str, grant: Granted) -> None:
        touched, quiesced = self._movements.outcome(acquisition_id)
        if quiesced:
            self.post(acquisition_id, grant)
        else:
            error = TransferFailed(_STILL_WRITTEN, touched=touched, quiesced=False)
            self.post(acquisition_id, decide.Fail(acquisition_id, error))

    def _post_outcome(self, decision: decide.LoadFromDisk | decide.Fail) -> None:
        acquisition_id = decision.acquisition_id
        touched, quiesced = self._movements.outcome(acquisition_id)
        if isinstance(decision, decide.Fail):
            decision.error.touched = decision.error.touched or touched
            decision.error.quiesced = decision.error.quiesced and quiesced
        elif not quiesced:  # the instance must not load into memory that may still be written
            self._unconfirmed.pop(acquisition_id, None)
            self._release_lease(decision.lease)
            error = TransferFailed(_STILL_WRITTEN, touched=True, quiesced=False)
            decision = decide.Fail(acquisition_id, error)
        self.post(acquisition_id, decision)
