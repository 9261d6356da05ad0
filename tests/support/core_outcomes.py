"""What the decisions on an acquisition mean in the words of Explain."""

from __future__ import annotations

from weight_broker.errors import LayoutMismatch
from weight_brokerd.core import decisions as decide
from weight_brokerd.core.answers import Outcome
from weight_brokerd.core.decisions import Decisions
from weight_brokerd.core.model import WaitReason


def concerns(decision: decide.Decision, acquisition_id: str, weight_set_id: str) -> bool:
    """Whether a decision is one for this acquisition."""
    match decision:
        case decide.Reserve(transfer):
            return transfer.acquisition_id == acquisition_id
        case decide.Wait(told) | decide.Fail(told):
            return told == acquisition_id
        case decide.ClaimLease(claimed):
            return claimed == weight_set_id
    return False


def outcome_of(decisions: Decisions, *, is_draining: bool) -> Outcome:
    """What Explain should have said of an acquisition for which these decisions were made."""
    if is_draining:
        return Outcome.DRAINING
    match decisions:
        case [decide.Reserve()]:
            return Outcome.TRANSFER
        case [decide.ClaimLease()]:
            return Outcome.COLD_LOAD
        case [decide.Wait(_, WaitReason.COLD_LOAD)] | []:  # silent while the directory is asked for the lease
            return Outcome.WAIT_FOR_COLD_LOAD
        case [decide.Wait()]:
            return Outcome.WAIT_FOR_SOURCE
        case [decide.Fail(_, LayoutMismatch())]:
            return Outcome.LAYOUT_MISMATCH
        case [decide.Fail(_, error)]:
            assert "unpublishable" in error.metadata
            return Outcome.UNPUBLISHABLE
    raise AssertionError(decisions)
