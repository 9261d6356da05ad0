"""Carries decisions out in order."""

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
    """Everything that core cannot do itself. A port only begins work that takes time; its end is an event."""

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
        """Let go of the memory that the transfer held, and stop moving its bytes."""

    def claim(self, weight_set_id: str, instance_id: str) -> None:
        """Ask the directory for the lease. Ends with `Coordinator.lease_claimed` or `claim_failed`."""

    def give_back(self, lease: ColdLoadLease) -> None:
        """Give the lease back to the directory, with retries. Ends with `Coordinator.lease_ended`."""

    def check(self, publication: Publication) -> None:
        """Compare the publication's content with its digests. Ends with `Coordinator.checked`."""

    def notice(self, notice: decide.Notice) -> None:
        """Tell the watchers."""

    def failed(self, decision: decide.Decision, error: Exception) -> None:
        """Report that a decision could not be carried out."""

    def settled(self) -> None:
        """The queue is empty: all decisions so far are carried out."""


class Executor:
    """One queue for the whole broker. Decisions of an event that a port reports during its call go to the end."""

    def __init__(self, ports: Ports) -> None:
        self._ports = ports
        self._queue: deque[decide.Decision] = deque()
        self._is_working = False

    def carry_out(self, decisions: Iterable[decide.Decision]) -> None:
        """Append to the queue; work it off unless an outer call does."""
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
        """An error of a port fails its own decision only: core does not repeat the decisions behind it."""
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
            case decide.CheckContent(publication):
                ports.check(publication)
            case (
                decide.WeightSetChanged() | decide.InstanceChanged() | decide.TransferChanged() | decide.DamageJudged()
            ):
                ports.notice(decision)
            case _:
                ports.answer(decision)
