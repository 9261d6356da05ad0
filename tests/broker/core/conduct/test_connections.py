"""Too many connections: the newest of a process that has them are closed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from weight_brokerd.core.conduct.connections import too_many
from weight_brokerd.core.model import Process

HONEST, FLOOD, FORK = Process(1, "1"), Process(2, "2"), Process(2, "3")


def test_of_a_process_with_too_many_the_oldest_stay() -> None:
    connections = dict.fromkeys(range(10), FLOOD) | {100: HONEST}
    assert sorted(too_many(connections, per_process=4, total=100)) == [4, 5, 6, 7, 8, 9]


def test_a_process_with_too_many_loses_few_at_once_unless_there_are_too_many_in_all() -> None:
    connections = dict.fromkeys(range(10), FLOOD)
    assert too_many(connections, per_process=4, total=100, at_once=2) == [9, 8]
    assert len(too_many(connections, per_process=4, total=5, at_once=2)) == 5


def test_where_there_are_too_many_in_all_the_user_with_the_most_gives_way() -> None:
    connections = {0: HONEST, 1: HONEST} | dict.fromkeys(range(2, 6), FLOOD) | dict.fromkeys(range(6, 9), FORK)
    closed = too_many(connections, per_process=10, total=5)
    assert len(closed) == 4
    assert not {0, 1} & set(closed)


@given(st.lists(st.sampled_from([HONEST, FLOOD, FORK]), max_size=40), st.integers(1, 8), st.integers(1, 20))
def test_what_is_left_keeps_every_bound_and_nothing_is_closed_in_vain(
    owners: list[Process], per_process: int, total: int
) -> None:
    connections = dict(enumerate(owners))
    closed = too_many(connections, per_process=per_process, total=total)
    left = [owner for number, owner in connections.items() if number not in closed]
    assert len(set(closed)) == len(closed)
    assert len(left) <= total
    assert all(left.count(owner) <= per_process for owner in owners)
    fits = len(owners) <= total and all(owners.count(owner) <= per_process for owner in owners)
    assert bool(closed) is not fits
