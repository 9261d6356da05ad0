"""What becomes of a call whose session or stage connection is lost: one repetition, or an error that fits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.scripted_broker import ScriptedBroker
from weight_broker.connection.session import Attachment, Session
from weight_broker.errors import BrokerError, BrokerUnavailable, NotAttached, TransferFailed

Fail = Callable[[], BrokerError]
LOST: dict[str, Fail] = {"session": lambda: NotAttached("unknown"), "stage connection": NotAttached.without_stage}


@pytest.fixture
def attachment(tmp_path: Path) -> Iterator[Attachment]:
    broker = ScriptedBroker(tmp_path).start()
    created = Attachment(tmp_path, "name", 60.0)
    yield created
    created.end()
    broker.stop()


class Action:
    """Fails so many times."""

    def __init__(self, *errors: BrokerError) -> None:
        self._errors = list(errors)
        self.sessions: list[Session] = []

    def __call__(self, session: Session) -> str:
        self.sessions.append(session)
        if self._errors:
            raise self._errors.pop(0)
        return "done"


@pytest.mark.parametrize("lost", LOST)
def test_only_a_lost_session_is_replaced(attachment: Attachment, lost: str) -> None:
    action = Action(LOST[lost]())
    assert attachment.run(action) == "done"
    first, second = action.sessions
    assert (first is second) is (lost == "stage connection")


def test_a_lost_stage_connection_of_a_session_that_is_over_costs_the_session(attachment: Attachment) -> None:
    first = attachment.session()
    action = Action(NotAttached.without_stage())

    def cut_off(session: Session) -> str:
        if session is first:
            session.break_off()
        return action(session)

    assert attachment.run(cut_off) == "done"
    assert action.sessions[1] is not first


@pytest.mark.parametrize("lost", LOST.values(), ids=LOST)
def test_a_call_without_time_for_a_repetition_has_met_an_unavailable_broker(attachment: Attachment, lost: Fail) -> None:
    attachment.session()
    action = Action(lost())
    with pytest.raises(BrokerUnavailable, match="no time left"):
        attachment.run(action, deadline=time.monotonic())
    assert len(action.sessions) == 1


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("error", [NotAttached, BrokerUnavailable])
def test_touched_tensors_are_a_failed_transfer_in_the_repetition_too(
    attachment: Attachment, error: type[BrokerError], again: bool
) -> None:
    before = [NotAttached.without_stage()] if again else []
    with pytest.raises(TransferFailed, match="cut off") as caught:
        attachment.run(Action(*before, error("gone", touched=True, quiesced=False)))
    assert (caught.value.touched, caught.value.quiesced) == (True, False)
