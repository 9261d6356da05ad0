"""Calls of all processes take turns; who asks too fast waits, and delays no other."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from weight_brokerd.core.conduct.pace import Pace, Paces
from weight_brokerd.core.conduct.turns import Turns
from weight_brokerd.core.model import Process

FAST = Pace(per_second=1e6, burst=1e6)


def process(number: int, uid: int = 1) -> Process:
    return Process(uid, str(number))


def turns(pace: Pace = FAST, user: Pace = FAST) -> Turns[str]:
    return Turns(process=pace, user=user)


def order(waiting: Turns[str], now: float = 0.0) -> list[str]:
    """The calls that may begin now, in their order."""
    found = []
    while (item := waiting.next(now)) is not None:
        found.append(item)
    return found


def test_one_call_does_not_wait_behind_the_thousand_of_another_process() -> None:
    waiting = turns()
    for number in range(1000):
        waiting.add(process(1), f"flood {number}")
    waiting.add(process(2), "honest")
    assert order(waiting).index("honest") <= 1


def test_one_call_does_not_wait_behind_the_thousand_processes_of_another_user() -> None:
    waiting = turns()
    for number in range(1000):
        waiting.add(process(number, uid=1), f"flood {number}")
    waiting.add(process(1, uid=2), "honest")
    assert order(waiting).index("honest") <= 1


def test_the_calls_of_one_process_keep_their_order() -> None:
    waiting = turns()
    for number in range(5):
        waiting.add(process(1), str(number))
    assert order(waiting) == ["0", "1", "2", "3", "4"]


def test_who_asks_faster_than_its_pace_waits_and_the_others_do_not() -> None:
    waiting = turns(Pace(per_second=10, burst=2))
    for number in range(5):
        waiting.add(process(1), f"flood {number}")
    assert order(waiting) == ["flood 0", "flood 1"]
    assert waiting.seconds_until_next(0.0) == waiting.seconds_until(process(1), 0.0) > 0
    waiting.add(process(2), "honest")
    assert order(waiting) == ["honest"]
    assert order(waiting, now=0.1) == ["flood 2"]


def test_calls_that_were_cancelled_while_they_waited_cost_their_process_and_not_their_user() -> None:
    waiting = turns(Pace(per_second=10, burst=10), Pace(per_second=10, burst=10))
    for number in range(100):
        waiting.add(process(1), str(number))
        waiting.remove(process(1), str(number), 0.0)
    assert waiting.seconds_until(process(1), 0.0) > 1
    assert waiting.pass_at_once(process(2), 0.0)


def test_who_was_refused_waits_longer_than_who_was_served() -> None:
    waiting = turns(Pace(per_second=10, burst=10))
    waiting.charge_refusal(process(1), 0.0)
    for number in (1, 2):
        waiting.add(process(number), f"of {number}")
    assert order(waiting) == ["of 2"]
    assert order(waiting, now=1.0) == ["of 1"]


def test_the_processes_of_a_user_share_its_pace() -> None:
    waiting = turns(FAST, Pace(per_second=10, burst=3))
    for number in range(5):
        waiting.add(process(number, uid=1), f"flood {number}")
    waiting.add(process(9, uid=2), "honest")
    assert sorted(order(waiting)) == ["flood 0", "flood 1", "flood 2", "honest"]


def test_a_call_passes_at_once_only_if_no_other_waits() -> None:
    waiting = turns(Pace(per_second=1, burst=1))
    assert waiting.pass_at_once(process(1), 0.0)
    assert not waiting.pass_at_once(process(1), 0.0)
    assert waiting.pass_at_once(process(2), 0.0)
    waiting.add(process(1), "one")
    assert not waiting.pass_at_once(process(3), 0.0)


def test_a_call_that_ends_while_it_waits_is_forgotten() -> None:
    waiting = turns()
    waiting.add(process(1), "one")
    waiting.add(process(1), "two")
    waiting.remove(process(1), "one", 0.0)
    waiting.remove(process(1), "one", 0.0)
    assert order(waiting) == ["two"]
    waiting.remove(process(1), "two", 0.0)
    assert (len(waiting), waiting.seconds_until_next(0.0)) == (0, None)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=60))
def test_every_call_has_its_turn_once_and_no_process_has_two_before_another_of_its_user(
    asked: list[tuple[int, int]],
) -> None:
    waiting: Turns[tuple[int, int, int]] = Turns(process=FAST, user=FAST)
    for index, (uid, number) in enumerate(asked):
        waiting.add(process(number, uid), (uid, number, index))
    seen: list[tuple[int, int, int]] = []
    while (item := waiting.next(0.0)) is not None:
        left = {(uid, number) for uid, number, _ in seen}
        seen.append(item)
        if item[:2] in left:
            others = {(uid, number) for uid, number in asked if uid == item[0]}
            assert others <= left, "another process of the user has not had its first turn"
    assert sorted(index for _, _, index in seen) == list(range(len(asked)))
    assert len(waiting) == 0


def test_who_has_paused_may_ask_a_burst_again_and_is_forgotten() -> None:
    paces = Paces(Pace(per_second=1, burst=3))
    for _ in range(3):
        assert paces.wait("a", 0.0) == 0
        paces.spend("a", 0.0)
    assert paces.wait("a", 0.0) == 1.0
    paces.tidy(1.0)
    assert len(paces) == 1
    paces.tidy(3.0)
    assert len(paces) == 0
