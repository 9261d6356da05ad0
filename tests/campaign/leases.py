"""Rules of cold-load leases: fencing tokens only grow, and no two processes hold the lease of a model at once.

A holding is the time in which a process certainly holds a lease: from the moment that it knows of it until it begins to
settle it, until it ends, or until a fault may have ended it. It is never longer than the broker's own view.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations

from campaign.history import Call, History, Strike

CLOCK_SECONDS = 0.5
"""By so much earlier a holding ends than the lease's own end, which is by another clock."""
ENDS_SESSION = frozenset({"hang up attach", "kill"})
ENDS_BROKER = frozenset({"broker kill", "broker terminate"})
LEAVING = frozenset({"close", "die"})
NEVER = float("inf")


@dataclass(frozen=True)
class Holding:
    """A process certainly holds the lease of a model."""

    call: Call
    token: int
    """0 for a load in `acquire_or_load`, which shows none."""
    since: float
    until: float

    def __str__(self) -> str:
        return f"process {self.call.process} in call {self.call.number}, token {self.token or 'not shown'}"


def tokens_only_grow(history: History) -> Iterator[str]:
    """Over all models and all lives of the broker: a lease that was granted after another one has a higher token."""
    granted = [call for call in history.calls if call.outcome == "leased"]
    for call in granted:
        if call.fencing_token <= 0:
            yield f"process {call.process}, call {call.number}: a lease without a fencing token"
    for first, second in combinations(sorted(granted, key=lambda call: call.ended or NEVER), 2):
        if first.model != second.model:
            continue
        is_later = first.ended is not None and first.ended < second.began
        if first.fencing_token == second.fencing_token and first.process != second.process:
            yield f"token {first.fencing_token} of {first.model} was granted twice"
        if is_later and second.fencing_token < first.fencing_token:
            yield f"token {second.fencing_token} of {first.model} was granted after {first.fencing_token}"


def one_holder_at_a_time(history: History) -> Iterator[str]:
    for first, second in combinations(holdings(history), 2):
        if first.call.model != second.call.model or first.call.process == second.call.process:
            continue
        if max(first.since, second.since) < min(first.until, second.until):
            yield f"two processes hold the lease of {first.call.model} at once: {first}; {second}"


def holdings(history: History) -> list[Holding]:
    """All of them; none for a call in which a fault may have ended the lease already."""
    found = []
    for call in history.calls:
        holding = _lease(call, history) or _load(call)
        if holding is None:
            continue
        ends = [strike.at for strike in _ending(holding, history) if strike.until >= call.began]
        if not any(at <= holding.since for at in ends):
            found.append(replace(holding, until=min([holding.until, *ends])))
    return found


def _lease(call: Call, history: History) -> Holding | None:
    """Of a lease that a process got, or extended, until the process's next call that ends it."""
    if call.outcome not in ("leased", "extended") or call.ended is None:
        return None
    later = [other for other in history.of_process(call.process) if other.number > call.number]
    ends = [other.began for other in later if other.operation in LEAVING or other.model == call.model]
    return Holding(call, call.fencing_token, call.ended, min([call.expires_at - CLOCK_SECONDS, *ends]))


def _load(call: Call) -> Holding | None:
    """Of a load from disk by right of a lease, within the call that made it."""
    if call.outcome != "loaded" or not call.has_lease or call.ended is None or not call.loading_since:
        return None
    return Holding(call, 0, call.loading_since, call.loaded_at or call.loading_since)


def _ending(holding: Holding, history: History) -> Iterator[Strike]:
    """The faults that may end a lease of this process."""
    for strike in history.strikes:
        if strike.kind in ENDS_BROKER or (strike.kind in ENDS_SESSION and strike.process == holding.call.process):
            yield strike
