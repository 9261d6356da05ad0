"""Carries decisions out in the order in which they were made."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Protocol

import structlog

from weight_brokerd.core import decisions as decide
from weight_brokerd.core.model import ColdLoadLease
from weight_brokerd.core.publications import Publication
from weight_brokerd.core.transfers import Transfer

log = structlog.get_logger()


class Ports(Protocol):
    """Everything that core cannot do itself. What takes time is begun here, and reports its end as an event."""

    def answer(self, answer: decide.Answer) -> None:
        """Tell the caller of the acquisition."""

    def hold(self, publication: Publication) -> None:
        """Make the publication's memory readable. Ends with `Coordinator.held` or `not_held`."""

    def release(self, publication: Publication) -> None:
        """Let go of the publication's memory."""

    def reserve(self, transfer: Transfer) -> None:
        """Keep the source readable for the transfer. Ends with `Coordinator.reserved` or `not_reserved`."""

    def move(self, transfer: Transfer) -> None:
        """Move the transfer's bytes. Ends with `Coordinator.transfer_moved` or `transfer_failed`."""

    def end(self, transfer: Transfer) -> None:
        """Let go of what the transfer held, and stop what moves its bytes."""

    def claim(self, weight_set_id: str, instance_id: str) -> None:
        """Ask the directory for the lease. Ends with `Coordinator.lease_claimed` or `claim_failed`."""

    def give_back(self, lease: ColdLoadLease) -> None:
        """Give the lease back to the directory, however often it takes. Ends with `Coordinator.lease_ended`."""

    def notice(self, notice: decide.Notice) -> None:
        """Tell those who watch."""

    def failed(self, decision: decide.Decision, error: Exception) -> None:
        """Feed back that an action could not even be begun."""

    def settled(self) -> None:
        """The queue is empty: every event so far has had its consequences."""


class Executor:
    """One queue for the whole broker. An event that a port reports while it is called comes after what is queued."""

    def __init__(self, ports: Ports) -> None:
        self._ports = ports
        self._queue: deque[decide.Decision] = deque()
        self._is_working = False

    def carry_out(self, decisions: Iterable[decide.Decision]) -> None:
        """Append to the queue; work it off unless a call further up is doing so."""
        self._queue.extend(decisions)
        if self._is_working:
            return
        self._is_working = True
        try:
            while self._queue:
                self._carry_out(self._queue.popleft())
        finally:
            self._is_working = False
        self._ports.settled()

    def _carry_out(self, decision: decide.Decision) -> None:
        """A port that raises concerns its own decision only: those behind it would not be made again."""
        try:
            self._call(decision)
        except Exception as error:
            log.exception("internal_error", decision=type(decision).__name__)
            self._ports.failed(decision, error)

    def _call(self, decision: decide.Decision) -> None:
        ports = self._ports
        match decision:
            case decide.Hold(publication):
                ports.hold(publication)
            case decide.Release(publication):
                ports.release(publication)
            case decide.Reserve(transfer):
                ports.reserve(transfer)
            case decide.Move(transfer):
                ports.move(transfer)
            case decide.EndTransfer(transfer):
                ports.end(transfer)
            case decide.ClaimLease(weight_set_id, instance_id):
                ports.claim(weight_set_id, instance_id)
            case decide.ReleaseLease(lease):
                ports.give_back(lease)
            case decide.WeightSetChanged() | decide.InstanceChanged() | decide.TransferChanged():
                ports.notice(decision)
            case _:
                ports.answer(decision)
