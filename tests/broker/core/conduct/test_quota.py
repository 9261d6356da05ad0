"""What a process and a user may have, and what is left for others."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from weight_broker.errors import BrokerError, PublishRefused, Reason
from weight_brokerd.core.conduct.quota import RETRY_SECONDS, Bound, Quota, take_all
from weight_brokerd.core.model import Process


def process(number: int, uid: int = 1) -> Process:
    return Process(uid, str(number))


def quota(total: int = 8, per_process: int = 3) -> Quota:
    return Quota("things", Bound("limits.things", total), Bound("limits.things_per_process", per_process))


def refusal_of(action: Callable[[], object]) -> BrokerError:
    with pytest.raises(PublishRefused) as refused:
        action()
    assert refused.value.reason is Reason.LIMIT_EXCEEDED
    return refused.value


def take(things: Quota, count: int, uid: int) -> None:
    """Of as many processes as it takes."""
    for number in range(count):
        things.take(process(number, uid))


def test_a_process_has_at_most_its_share_and_the_refusal_names_the_setting() -> None:
    things = quota()
    for _ in range(3):
        things.take(process(1))
    error = refusal_of(lambda: things.take(process(1)))
    assert (error.metadata["limit"], error.metadata["value"]) == ("limits.things_per_process", "3")
    assert float(error.metadata[RETRY_SECONDS]) > 0
    things.take(process(2))
    things.give_back(process(1))
    things.take(process(1))


def test_a_user_leaves_a_quarter_for_others_however_many_processes_it_has() -> None:
    things = quota(total=8)
    take(things, 6, uid=1)
    error = refusal_of(lambda: things.take(process(99, uid=1)))
    assert (error.metadata["limit"], error.metadata["value"]) == ("limits.things", "6")
    take(things, 2, uid=2)
    assert refusal_of(lambda: things.take(process(1, uid=3))).metadata["value"] == "8"
    assert len(things) == 8


def test_of_few_things_a_user_may_have_all() -> None:
    things = quota(total=1)
    things.take(process(1))
    assert refusal_of(lambda: things.take(process(2))).metadata["limit"] == "limits.things"


def test_several_at_once_are_lent_or_none() -> None:
    things = quota()
    refusal_of(lambda: things.take(process(1), 4))
    assert (len(things), things.of_process(process(1))) == (0, 0)
    things.take(process(1), 3)
    things.give_back(process(1), 3)
    assert len(things) == 0


def test_of_several_quotas_all_lend_or_none() -> None:
    first, second = quota(), quota(per_process=1)
    take_all((first, second), process(1))
    refusal_of(lambda: take_all((first, second), process(1)))
    assert (len(first), len(second)) == (1, 1)
