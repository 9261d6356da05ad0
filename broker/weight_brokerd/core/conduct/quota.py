"""How many of a thing the broker lends, in all, to one process and to one user.

A user may take three quarters of everything, so that a user who takes what there is leaves room for the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from weight_broker.errors import BrokerError, Reason, from_reason
from weight_brokerd.core.model import Limits, Process

RETRY_SECONDS = "retry_seconds"
"""Metadata of an error: when the caller may ask again."""
_RETRY_AFTER = "1"
_SHARE_KEPT_FOR_OTHERS = 4
"""One part in so many."""


@dataclass(frozen=True, slots=True)
class Bound:
    """A number and the setting that it comes from."""

    setting: str
    most: int


class Quota:
    """Counts what is lent, and refuses what goes beyond a bound."""

    def __init__(self, things: str, total: Bound, per_process: Bound, *, remedy: str = "let go of some,") -> None:
        """`things` for people, in the plural; `remedy` too, what one can do who has too many."""
        self._things = things
        self._remedy = remedy
        self._total = total
        self._per_process = per_process
        self._per_user = Bound(total.setting, total.most - total.most // _SHARE_KEPT_FOR_OTHERS)
        self._lent = 0
        self._by_process: Counter[Process] = Counter()
        self._by_user: Counter[int] = Counter()

    def __len__(self) -> int:
        return self._lent

    def of_process(self, process: Process) -> int:
        """What the process has now."""
        return self._by_process[process]

    def take(self, process: Process, count: int = 1) -> None:
        """Lend to the process; raises LIMIT_EXCEEDED, and then nothing is lent."""
        has = self._by_process[process]
        if has + count > self._per_process.most:
            raise refusal(f"process {process.name} has {has} {self._things}", self._per_process, count, self._remedy)
        if self._by_user[process.uid] + count > self._per_user.most:
            what = f"the processes of user {process.uid} have {self._by_user[process.uid]} {self._things}"
            raise refusal(f"{what}, and a part is kept for other users", self._per_user, count, self._remedy)
        if self._lent + count > self._total.most:
            raise refusal(f"this broker has {self._lent} {self._things}", self._total, count, self._remedy)
        self._add(process, count)

    def give_back(self, process: Process, count: int = 1) -> None:
        """The process has let go."""
        self._add(process, -count)

    def _add(self, process: Process, count: int) -> None:
        self._lent += count
        self._by_process[process] += count
        if not self._by_process[process]:
            del self._by_process[process]
        self._by_user[process.uid] += count
        if not self._by_user[process.uid]:
            del self._by_user[process.uid]


def refusal(what: str, bound: Bound, count: int = 1, remedy: str = "let go of some") -> BrokerError:
    """The error for `count` things beyond a bound; `what` says how many there are."""
    excess = "as many as" if count == 1 else f"and {count} more would be above what"
    return from_reason(
        Reason.LIMIT_EXCEEDED,
        f"{what}, {excess} {bound.setting} allows ({bound.most}); {remedy} or raise it",
        metadata={"limit": bound.setting, "value": str(bound.most), RETRY_SECONDS: _RETRY_AFTER},
    )


def instance_slots(limits: Limits) -> Quota:
    """The quota of instances."""
    total = Bound("limits.instances", limits.instances)
    return Quota("instances", total, Bound("limits.instances_per_process", limits.instances_per_process))


def take_all(quotas: Sequence[Quota], process: Process) -> None:
    """Take one of every quota; of none if one refuses."""
    lenders: list[Quota] = []
    try:
        for quota in quotas:
            quota.take(process)
            lenders.append(quota)
    except BrokerError:
        for quota in lenders:
            quota.give_back(process)
        raise
