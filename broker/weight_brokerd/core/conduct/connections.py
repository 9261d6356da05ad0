"""Which connections are too many: gRPC accepts all, so the broker closes the newest of a process that has too many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from weight_brokerd.core.model import Process

CLOSED_AT_ONCE = 50
"""Of a process with too many. It connects again at once, which costs more than an idle connection."""


def too_many(
    connections: Mapping[int, Process], *, per_process: int, total: int, at_once: int = CLOSED_AT_ONCE
) -> list[int]:
    """The connections to close. They are numbered by age; of each process the oldest stay. Where there are too many in
    all, the process with the most of the user with the most gives way at once."""
    left: dict[Process, list[int]] = {}
    for number in sorted(connections):
        left.setdefault(connections[number], []).append(number)
    closed = []
    of_user = Counter[int]()
    for process, numbers in left.items():
        for _ in range(min(len(numbers) - per_process, at_once)):
            closed.append(numbers.pop())
        of_user[process.uid] += len(numbers)
    for _ in range(of_user.total() - total):
        user = max(of_user, key=lambda uid: of_user[uid])
        most = max((process for process in left if process.uid == user), key=lambda process: len(left[process]))
        closed.append(left[most].pop())
        of_user[user] -= 1
    return closed
