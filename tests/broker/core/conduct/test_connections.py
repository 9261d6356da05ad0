"""Too many connections: a process has a bounded number; in all, the newest of whoever has the most gives way."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from weight_brokerd.core.conduct.connections import Connections
from weight_brokerd.core.model import Process

HONEST, FLOOD, FORK = Process(1, "1"), Process(2, "2"), Process(2, "3")


def open_all(owners: list[Process], *, per_process: int, total: int) -> dict[int, Process]:
    """What stays of connections that are opened one after the other, by their numbers."""
    connections: Connections[int] = Connections(per_process=per_process, total=total)
    left: dict[int, Process] = {}
    for number, owner in enumerate(owners):
        if connections.has_all(owner):
            continue
        connections.add(owner, number)
        left[number] = owner
        excess = connections.one_too_many()
        if excess is not None:
            connections.discard(excess)
            del left[excess]
        assert len(connections) == len(left)
    return left


def test_of_a_process_with_too_many_the_oldest_stay() -> None:
    left = open_all([FLOOD] * 10 + [HONEST], per_process=4, total=100)
    assert list(left) == [0, 1, 2, 3, 4, 10]


def test_a_process_whose_connection_has_ended_may_open_another() -> None:
    connections: Connections[str] = Connections(per_process=0, total=10)
    connections.add(FLOOD, "first")
    assert connections.process_of("first") == FLOOD
    assert connections.has_all(FLOOD)
    assert not connections.has_all(FORK)
    connections.discard("first")
    connections.discard("first")
    assert not connections.has_all(FLOOD)
    assert len(connections) == 0


def test_the_newest_connection_is_one_too_many_until_an_older_one_ends() -> None:
    connections: Connections[str] = Connections(per_process=2, total=10)
    for name in ("first", "second", "third"):
        assert not connections.has_all(FLOOD)
        connections.add(FLOOD, name)
    assert connections.has_all(FLOOD)
    assert [name for name in ("first", "second", "third") if connections.is_excess(name)] == ["third"]
    connections.discard("second")
    assert not connections.is_excess("third")


def test_where_there_are_too_many_in_all_the_user_with_the_most_gives_way() -> None:
    left = open_all([FLOOD] * 4 + [FORK] * 3 + [HONEST] * 2, per_process=10, total=5)
    assert list(left.values()).count(HONEST) == 2
    assert len(left) == 5


def test_the_process_that_fills_the_room_loses_its_own_newest_connection() -> None:
    left = open_all([HONEST] + [FLOOD] * 9, per_process=10, total=5)
    assert list(left) == [0, 1, 2, 3, 4]


@given(st.lists(st.sampled_from([HONEST, FLOOD, FORK]), max_size=40), st.integers(1, 8), st.integers(1, 20))
def test_what_is_left_keeps_every_bound_and_nothing_is_closed_in_vain(
    owners: list[Process], per_process: int, total: int
) -> None:
    left = list(open_all(owners, per_process=per_process, total=total).values())
    assert len(left) <= total
    assert all(left.count(owner) <= per_process + 1 for owner in owners)
    fits = len(owners) <= total and all(owners.count(owner) <= per_process + 1 for owner in owners)
    assert (left == owners) is fits
