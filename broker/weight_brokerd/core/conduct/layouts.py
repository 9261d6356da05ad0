"""The room for layouts: as many tensors as the publications and the running acquisitions of processes may name.

Every holder counts in full, also where equal layouts are one object: whether a process is refused does not depend on
what others hold, and the end of one holder makes no other one pay.
"""

from __future__ import annotations

from weight_broker.layout import Layout
from weight_brokerd.core.conduct.quota import Bound, Quota
from weight_brokerd.core.model import Limits, Process


class LayoutRoom:
    """One for a broker. It is the `weight_brokerd.core.publications.Room`."""

    def __init__(self, limits: Limits) -> None:
        self._quota = Quota(
            "tensors in layouts",
            Bound("limits.layout_tensors", limits.layout_tensors),
            Bound("limits.layout_tensors_per_process", limits.layout_tensors_per_process),
            remedy="retract publications, or end acquisitions,",
        )
        self._held: dict[str, tuple[Process, int]] = {}
        """Process and tensors, by the id of the publication or acquisition."""

    def __len__(self) -> int:
        return len(self._quota)

    def take(self, holder: str, process: Process, layout: Layout | None) -> None:
        count = len(layout) if layout is not None else 0
        if count:
            self._quota.take(process, count)
            self._held[holder] = process, count

    def give_back(self, holder: str) -> None:
        if holder in self._held:
            self._quota.give_back(*self._held.pop(holder))
