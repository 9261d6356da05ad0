"""A coordinator whose sources are reserved at once, as those of a host's own memory are."""

from __future__ import annotations

from weight_brokerd.core import decisions as decide
from weight_brokerd.core.coordinator import Coordinator
from weight_brokerd.core.decisions import Decisions
from weight_brokerd.core.model import DataPlane


class LocalCoordinator(Coordinator):
    """Answers each `Reserve` with `reserved` in the same step."""

    def _settle(self, now: float, *touched: str) -> Decisions:
        decisions: Decisions = []
        for decision in super()._settle(now, *touched):
            decisions.append(decision)
            if isinstance(decision, decide.Reserve):
                decisions += self.reserved(decision.transfer.transfer_id, DataPlane.LOCAL)
        return decisions
