"""What a caller gets that no source can serve: one table for one caller, for a group and for Explain."""

from __future__ import annotations

from dataclasses import replace

import pytest

from weight_brokerd.core.answers import Situation, Verdict, Wish, judge
from weight_brokerd.core.model import ColdLoadLease, IfAbsent
from weight_brokerd.core.sources import Holder

LEASE = ColdLoadLease("w", 1, Holder("host", "a"), 0.0, 60.0)
NOTHING = Situation(
    is_draining=False,
    is_busy=False,
    is_coming=False,
    layout_differs=False,
    lease=None,
    claim_pending=False,
    unpublishable="",
)
EVERYTHING = Situation(
    is_draining=True,
    is_busy=True,
    is_coming=True,
    layout_differs=True,
    lease=LEASE,
    claim_pending=True,
    unpublishable="it moved",
)


@pytest.mark.parametrize(
    ("situation", "fail", "wait", "load"),
    [
        (NOTHING, Verdict.REFUSE_ABSENT, Verdict.REFUSE_ABSENT, Verdict.CLAIM),
        (replace(NOTHING, claim_pending=True), Verdict.REFUSE_ABSENT, Verdict.CLAIM_PENDING, Verdict.CLAIM_PENDING),
        (replace(NOTHING, lease=LEASE), Verdict.REFUSE_ABSENT, Verdict.WAIT_COLD_LOAD, Verdict.WAIT_COLD_LOAD),
        (replace(NOTHING, is_coming=True), Verdict.REFUSE_ABSENT, Verdict.WAIT_REGISTERING, Verdict.WAIT_REGISTERING),
        (replace(NOTHING, is_coming=True, lease=LEASE), Verdict.REFUSE_ABSENT, *[Verdict.WAIT_COLD_LOAD] * 2),
        (replace(NOTHING, is_coming=True, layout_differs=True), Verdict.REFUSE_LAYOUT, *[Verdict.WAIT_REGISTERING] * 2),
        (replace(NOTHING, is_busy=True), *[Verdict.WAIT_BUSY] * 3),
        (replace(NOTHING, layout_differs=True, lease=LEASE), *[Verdict.REFUSE_LAYOUT] * 3),
        (replace(NOTHING, unpublishable="it moved", lease=LEASE), *[Verdict.REFUSE_UNPUBLISHABLE] * 3),
        (replace(EVERYTHING, is_draining=False), *[Verdict.WAIT_BUSY] * 3),
        (EVERYTHING, *[Verdict.REFUSE_DRAINING] * 3),
    ],
)
def test_the_verdict_is_the_soonest_help_there_is(
    situation: Situation, fail: Verdict, wait: Verdict, load: Verdict
) -> None:
    assert [judge(Wish(wanted), situation) for wanted in IfAbsent] == [fail, wait, load]


def test_a_caller_that_will_not_load_waits_for_no_load_after_a_source_has_failed() -> None:
    situation = replace(NOTHING, lease=LEASE)
    assert judge(Wish(IfAbsent.WAIT, has_tried=True), situation) is Verdict.REFUSE_ABSENT
    assert judge(Wish(IfAbsent.LOAD, has_tried=True), situation) is Verdict.WAIT_COLD_LOAD
