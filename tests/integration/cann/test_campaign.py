"""A short campaign of `make torture` in the memory of emulated cards, with the real datasystem."""

from __future__ import annotations

from pathlib import Path

import pytest

from campaign.model import violations
from campaign.run import Order, campaign, summary
from doubles.cann.build import CannotBuild, build
from support.datasystem_worker import require_wheel

ORDER = Order(seed=154, seats=4, operations=20, fault_rate=0.15, memory="npu")


@pytest.mark.timeout(900)
def test_under_faults_device_memory_has_no_wrong_byte_and_nothing_is_left(tmp_path: Path) -> None:
    require_wheel()
    try:
        build()
    except CannotBuild as error:
        if "needs a C compiler" in str(error):
            pytest.skip(str(error))
        raise
    history = campaign(ORDER, tmp_path)
    found = violations(history)
    assert found == [], f"{summary(history)}\nthe same decisions again: {ORDER.command}"
    assert {"filled", "published"} <= {call.outcome for call in history.calls}, summary(history)
