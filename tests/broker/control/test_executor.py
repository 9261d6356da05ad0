"""Decisions are carried out in the order in which they were made, whatever their ports report meanwhile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from structlog.testing import capture_logs

from weight_brokerd.control.executor import Executor
from weight_brokerd.core import decisions as decide


class ScriptedPorts:
    """Notes what it is called with; `on` runs while a notice is being carried out."""

    def __init__(self) -> None:
        self.seen: list[object] = []
        self.on: dict[str, Callable[[], None]] = {}

    def notice(self, notice: decide.Notice) -> None:
        assert isinstance(notice, decide.InstanceChanged)
        self.seen.append(notice.instance_id)
        self.on.get(notice.instance_id, lambda: None)()

    def failed(self, decision: decide.Decision, error: Exception) -> None:
        assert isinstance(decision, decide.InstanceChanged)
        self.seen.append((decision.instance_id, str(error)))

    def settled(self) -> None:
        self.seen.append("settled")

    def _unexpected(self, *arguments: object) -> None:
        raise AssertionError(arguments)

    answer = hold = release = reserve = move = end = claim = give_back = check = _unexpected


def changed(*names: str) -> decide.Decisions:
    return [decide.InstanceChanged(name) for name in names]


@pytest.fixture
def ports() -> ScriptedPorts:
    return ScriptedPorts()


@pytest.fixture
def executor(ports: ScriptedPorts) -> Executor:
    return Executor(ports)


def test_what_a_port_reports_comes_after_what_is_queued(ports: ScriptedPorts, executor: Executor) -> None:
    ports.on["a"] = lambda: executor.carry_out(changed("c"))
    executor.carry_out(changed("a", "b"))
    assert ports.seen == ["a", "b", "c", "settled"]


def test_a_port_that_fails_is_logged_fed_back_and_takes_no_other_with_it(
    ports: ScriptedPorts, executor: Executor
) -> None:
    def fail() -> None:
        raise RuntimeError("no a")

    ports.on["a"] = fail
    with capture_logs() as logged:
        executor.carry_out(changed("a", "b"))
    assert ports.seen == ["a", ("a", "no a"), "b", "settled"]
    assert [(entry["event"], entry["decision"]) for entry in logged] == [("internal_error", "InstanceChanged")]


def test_the_queue_works_again_after_an_error_that_cannot_be_fed_back(ports: ScriptedPorts, executor: Executor) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    ports.on["a"] = fail
    with pytest.raises(KeyboardInterrupt):
        executor.carry_out(changed("a", "b"))
    executor.carry_out(changed("c"))
    assert ports.seen == ["a", "b", "c", "settled"]
