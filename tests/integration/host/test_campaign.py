"""A short campaign of `make torture`: real instances and a broker under faults from outside, judged by a model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from campaign.history import Call, History
from campaign.model import violations
from campaign.run import Order, campaign, summary

ORDER = Order(seed=51, seats=4, operations=30, fault_rate=0.15)


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> History:
    return campaign(ORDER, tmp_path_factory.mktemp("campaign"))


def with_one_more(history: History, outcome: str, **values: object) -> History:
    """The history in which one call of this outcome went otherwise."""
    found = next(call for call in history.calls if call.outcome == outcome)
    changed: Call = replace(found, **values)  # type: ignore[arg-type]
    return replace(history, calls=tuple(changed if call is found else call for call in history.calls))


pytestmark = pytest.mark.timeout(900)  # against hanging, on a machine that does much else


def test_under_faults_no_wrong_byte_no_second_holder_no_late_call_and_nothing_left(history: History) -> None:
    found = violations(history)
    assert found == [], f"{summary(history)}\nthe same decisions again: {ORDER.command}"


def test_the_campaign_was_one(history: History) -> None:
    """Weights went from instance to instance and came from disk, instances and brokers died."""
    outcomes = {call.outcome for call in history.calls}
    assert {"filled", "published", "closed"} <= outcomes, summary(history)
    assert outcomes & {"loaded", "leased"}, summary(history)
    kinds = {strike.kind for strike in history.strikes}
    assert {"kill", "stop"} <= kinds, summary(history)
    assert any(kind.startswith("broker") for kind in kinds), summary(history)


def test_the_same_history_with_one_wrong_byte_one_late_call_or_one_loss_is_rejected(history: History) -> None:
    assert any("wrong bytes" in text for text in violations(with_one_more(history, "filled", after="0" * 32)))
    assert any("deadline" in text for text in violations(with_one_more(history, "published", ended=1e12)))
    assert any("pieces" in text for text in violations(with_one_more(history, "closed", left=1)))
    assert any("left" in text for text in violations(replace(history, remains={"regions": 1})))
