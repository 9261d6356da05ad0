"""What each acquisition is told, in order.

What lets a receiver use its memory for something else - an error, a cold load - is told once nobody writes there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass

from weight_broker.errors import TransferFailed
from weight_brokerd.control.movements import Movements
from weight_brokerd.core import decisions as decide
from weight_brokerd.core.model import ColdLoadLease, Transfer


@dataclass(frozen=True, slots=True)
class Granted:
    """A source is reserved for an acquisition; its memory is held for the transfer."""

    transfer: Transfer
    message: bytes
    """What the receiver learns of the source's memory: a serialized Granted."""


@dataclass(frozen=True, slots=True)
class Moved:
    """The broker has moved every byte; the receiver is to verify them."""

    transfer: Transfer
    seconds: Mapping[str, float]
    """By phase."""


AcquisitionEvent = Granted | Moved | decide.Wait | decide.TellColdLoad | decide.Complete | decide.Fail
Mailbox = asyncio.Queue[AcquisitionEvent]


class Mailboxes:
    """One for each acquisition whose call is open."""

    def __init__(
        self,
        movements: Movements,
        release_lease: Callable[[ColdLoadLease], None],
        spawn: Callable[[Coroutine[None, None, None]], None],
    ) -> None:
        """`release_lease` ends a lease that nobody heard of; `spawn` runs what nobody waits for."""
        self._movements = movements
        self._release_lease = release_lease
        self._spawn = spawn
        self._open: dict[str, Mailbox] = {}
        self._unheard: dict[str, ColdLoadLease] = {}
        """Leases whose answer may not have reached its caller yet, by acquisition."""

    def open(self, acquisition_id: str) -> Mailbox:
        """A new one."""
        mailbox = self._open[acquisition_id] = Mailbox()
        return mailbox

    def close(self, acquisition_id: str) -> None:
        """The call is over; a lease that it never heard of goes back."""
        self._open.pop(acquisition_id, None)
        unheard = self._unheard.pop(acquisition_id, None)
        if unheard is not None:
            self._release_lease(unheard)

    def lease_heard(self, acquisition_id: str) -> None:
        """The answer of a call that is to load from disk was sent."""
        self._unheard.pop(acquisition_id, None)

    def post(self, acquisition_id: str, event: AcquisitionEvent) -> None:
        """Tells it now."""
        mailbox = self._open.get(acquisition_id)
        if mailbox is not None:
            mailbox.put_nowait(event)

    def post_end(self, decision: decide.TellColdLoad | decide.Fail) -> None:
        """Tells it once nobody writes to the receiver's memory any more."""
        if isinstance(decision, decide.TellColdLoad):
            self._unheard[decision.acquisition_id] = decision.lease
        movements = self._movements
        if not movements.is_moving(decision.acquisition_id):
            self._post_outcome(decision)
            return

        async def post() -> None:
            await movements.settled(decision.acquisition_id)
            self._post_outcome(decision)

        self._spawn(post())

    def _post_outcome(self, decision: decide.TellColdLoad | decide.Fail) -> None:
        acquisition_id = decision.acquisition_id
        touched, quiesced = self._movements.outcome(acquisition_id)
        if isinstance(decision, decide.Fail):
            decision.error.touched = decision.error.touched or touched
            decision.error.quiesced = decision.error.quiesced and quiesced
        elif not quiesced:  # nothing may be loaded into that memory
            self._unheard.pop(acquisition_id, None)
            self._release_lease(decision.lease)
            error = TransferFailed("a failed transfer may still write to the memory", touched=True, quiesced=False)
            decision = decide.Fail(acquisition_id, error)
        self.post(acquisition_id, decision)
