"""The model accepts a history in which everything went right, and rejects it as soon as one thing in it is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from campaign.history import Call, Ending, History, Recorder, Strike, read
from campaign.model import GUARD_SECONDS, violations
from campaign.plan import BROKER_FAULTS, INSTANCE_FAULTS, OPERATIONS, steps
from campaign.weights import MODELS, content, right, untouched

Change = Callable[[History], History]


def call(
    process: str, number: int, operation: str, began: float, ended: float | None, outcome: str, **more: object
) -> Call:
    """A call on the model "small" that leaves the bytes that its outcome stands for."""
    after = untouched("small") if outcome in ("leased", "WEIGHTS_NOT_FOUND", "ACQUIRE_TIMEOUT") else right("small")
    values: dict[str, object] = {"after": after, **more}
    return Call(process, number, operation, "small", 10.0, began, ended, outcome, **values)  # type: ignore[arg-type]


RIGHT = History(
    calls=(
        call("0.1", 1, "acquire", 1.0, 1.5, "WEIGHTS_NOT_FOUND"),
        call("0.1", 2, "lease", 2.0, 2.5, "leased", found=untouched("small"), fencing_token=7, expires_at=60.0),
        call("1.1", 1, "acquire_or_load", 2.2, 5.0, "filled", generation=100),
        call("0.1", 3, "settle", 4.0, 4.5, "published", found=untouched("small"), generation=100, fencing_token=7),
        call("2.1", 1, "attach", 5.0, 5.1, "attached", after="", views={"small": right("small")}, generation=100),
        call("3.1", 1, "acquire", 5.5, None, "", after=""),
        call("0.1", 4, "retract", 6.0, 6.5, "retracted", found=right("small"), generation=100),
        call("2.1", 2, "lease", 7.0, 7.5, "leased", fencing_token=8, expires_at=60.0, views={"small": right("small")}),
        call("1.1", 2, "close", 8.0, 8.5, "closed", found=right("small")),
        call("2.1", 3, "close", 9.0, 9.5, "closed", found=untouched("small"), after=untouched("small")),
        call(
            "0.1", 5, "acquire_or_load", 10.0, 11.0, "loaded",
            found=right("small"), loading_since=10.2, loaded_at=10.8, has_lease=True,
        ),
        call("0.1", 6, "close", 12.0, 12.5, "closed", found=right("small")),
    ),
    strikes=(Strike("kill", "3.1", 5.6, 5.7),),
    endings=(Ending("0.1", 0, 13.0), Ending("1.1", 0, 9.0), Ending("2.1", 0, 10.0), Ending("3.1", -9, 5.8)),
    remains={"publications": 0, "processes": 0},
)  # fmt: skip


def with_call(process: str, number: int, **values: object) -> Change:
    """The history in which one call is otherwise."""

    def change(history: History) -> History:
        calls = [
            replace(one, **values) if (one.process, one.number) == (process, number) else one  # type: ignore[arg-type]
            for one in history.calls
        ]
        assert tuple(calls) != history.calls, "nothing was changed"
        return replace(history, calls=tuple(calls))

    return change


def with_more(*calls: Call) -> Change:
    return lambda history: replace(history, calls=tuple(sorted((*history.calls, *calls), key=lambda one: one.began)))


def without_strikes(history: History) -> History:
    return replace(history, strikes=())


SECOND_LOAD = call(
    "1.1", 3, "acquire_or_load", 7.6, 7.9, "loaded", found=right("small"), loading_since=7.7, loaded_at=7.8
)
OF_ANOTHER_MODEL = call("1.1", 4, "publish", 8.1, 8.2, "published", generation=101)
WRONG: dict[str, tuple[Change, str]] = {
    "a filled tensor with other bytes": (with_call("1.1", 1, after="0" * 32), "wrong bytes"),
    "a filled tensor with the bytes of another model": (with_call("1.1", 1, after=right("tiny")), "wrong bytes"),
    "a filled tensor that stayed blank": (with_call("1.1", 1, after=untouched("small")), "wrong bytes"),
    "a load from disk that left other bytes": (with_call("0.1", 5, after="0" * 32), "wrong bytes"),
    "a published tensor that changed": (with_call("0.1", 3, after="0" * 32), "wrong bytes"),
    "attached tensors with other bytes": (with_call("2.1", 1, views={"small": "0" * 32}), "wrong bytes"),
    "attached tensors that change later": (with_call("2.1", 2, views={"small": "0" * 32}), "wrong bytes"),
    "a miss that touched the tensors": (with_call("0.1", 1, after="0" * 32), "nothing was touched"),
    "a lease that touched the tensors": (with_call("2.1", 2, after=right("small")), "nothing was touched"),
    "a write after the end of a call": (with_call("0.1", 2, found="0" * 32), "tensors changed since"),
    "a token that does not grow": (with_call("2.1", 2, fencing_token=6), "was granted after"),
    "a token that repeats": (with_call("2.1", 2, fencing_token=7), "granted twice"),
    "a lease without a token": (with_call("2.1", 2, fencing_token=0), "without a fencing token"),
    "two leases at once": (with_call("2.1", 2, began=3.0, ended=3.5), "at once"),
    "a lease during a load": (with_more(replace(SECOND_LOAD, has_lease=True)), "at once"),
    "wrong bytes that the client noticed": (with_call("1.1", 1, outcome="INTEGRITY_ERROR"), "INTEGRITY_ERROR"),
    "a defect of the broker": (with_call("0.1", 1, outcome="INTERNAL"), "INTERNAL"),
    "a request that is refused": (with_call("0.1", 1, outcome="INVALID_ARGUMENT"), "INVALID_ARGUMENT"),
    "another exception": (with_call("0.1", 1, outcome="crashed", message="ValueError", touched=True), "ValueError"),
    "a session that is lost without a fault": (with_call("0.1", 1, outcome="NOT_ATTACHED"), "NOT_ATTACHED"),
    "a call that is late": (with_call("0.1", 6, ended=12.0 + 10.0 + GUARD_SECONDS + 1), "after its deadline"),
    "a call that never ends": (with_call("1.1", 2, ended=None), "never ended"),
    "a process that dies": (without_strikes, "ended by itself with status -9"),
    "a process that crashes": (
        lambda history: replace(history, endings=(*history.endings[1:], Ending("0.1", -11, 13.0))), "status -11"
    ),
    "a broker that ends": (
        lambda history: replace(history, endings=(*history.endings, Ending("broker", 1, 3.0))), "process broker"
    ),
    "a process that stays": (lambda history: replace(history, endings=history.endings[1:]), "process 0.1 never ended"),
    "a generation that repeats": (
        with_more(call("1.1", 4, "publish", 8.1, 8.2, "published", found=right("small"), generation=100)), "belongs to"
    ),
    "a source of another model": (
        with_more(
            replace(OF_ANOTHER_MODEL, model="tiny", after=right("tiny")),
            call("1.1", 5, "acquire", 8.3, 8.4, "filled", found=right("small"), generation=101),
        ),
        "which is tiny",
    ),
    "a source that is retracted": (with_call("1.1", 1, began=6.6, ended=6.7), "after"),
    "a publication that stays": (lambda history: replace(history, remains={"publications": 1}), "1 publications"),
    "no look at what is left": (lambda history: replace(history, remains={}), "not looked for"),
    "memory that stays in a process": (with_call("1.1", 2, left=1), "1 pieces of memory"),
    "a rule of the driver that is broken": (lambda history: replace(history, misuses=("freed twice",)), "freed twice"),
    "a traceback in the log": (lambda history: replace(history, defects=("Traceback",)), "Traceback"),
}  # fmt: skip


def test_a_history_in_which_everything_went_right_is_accepted() -> None:
    assert violations(RIGHT) == []


@pytest.mark.parametrize("what", WRONG)
def test_a_history_with_one_thing_wrong_is_rejected_for_it(what: str) -> None:
    change, sentence = WRONG[what]
    found = violations(change(RIGHT))
    assert any(sentence in violation for violation in found), found


@pytest.mark.parametrize(
    "strike",
    [
        Strike("kill", "0.1", 2.7, 2.8),
        Strike("hang up attach", "0.1", 2.7, 2.8),
        Strike("broker kill", "broker", 2.7, 2.8),
    ],
    ids=lambda strike: strike.kind,
)
def test_a_lease_may_follow_one_whose_holder_or_broker_is_gone(strike: Strike) -> None:
    history = with_call("2.1", 2, began=2.9, ended=3.5)(RIGHT)
    assert any("at once" in violation for violation in violations(history))
    history = replace(history, strikes=(*history.strikes, strike))
    assert not any("at once" in violation for violation in violations(history))


def test_a_lease_may_follow_one_whose_holder_ended_itself() -> None:
    history = with_call("2.1", 2, began=2.9, ended=3.5)(RIGHT)
    history = with_call("0.1", 3, operation="die", ended=None, began=2.8, outcome="", after="")(history)
    assert not any("at once" in violation for violation in violations(history))


def test_a_connection_that_was_cut_excuses_no_reading_after_a_retraction() -> None:
    history = with_call("1.1", 1, began=6.6, ended=6.7)(RIGHT)
    history = replace(history, strikes=(*history.strikes, Strike("hang up attach", "0.1", 5.0, 5.1)))
    assert any("had returned" in violation for violation in violations(history))


@pytest.mark.parametrize("kind", ["broker stop", "broker disk full", "hang up grpc", "stop"])
def test_no_other_fault_ends_a_lease(kind: str) -> None:
    history = with_call("2.1", 2, began=2.9, ended=3.5)(RIGHT)
    history = replace(history, strikes=(*history.strikes, Strike(kind, "0.1", 2.7, 2.8)))
    assert any("at once" in violation for violation in violations(history))


def test_a_call_is_not_late_for_the_time_in_which_its_process_was_stopped() -> None:
    late = with_call("0.1", 6, ended=12.0 + 10.0 + GUARD_SECONDS + 1)(RIGHT)
    assert violations(replace(late, strikes=(*late.strikes, Strike("stop", "0.1", 13.0, 15.0)))) == []


def test_what_a_process_wrote_before_it_was_killed_is_read_as_far_as_it_came(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "1.1.jsonl")
    began = {"operation": "acquire", "model": "tiny", "timeout": 1.0, "began": 5.0}
    recorder.write("call", process="1.1", number=1, **began)
    recorder.write("call", process="1.1", number=1, ended=6.0, outcome="filled")
    recorder.write("call", process="1.1", number=2, **(began | {"began": 7.0}))
    with (tmp_path / "1.1.jsonl").open("a") as file:
        file.write(json.dumps({"event": "call", "process": "1.1"})[:-5])
    done, killed = read(tmp_path).calls
    assert (done.outcome, done.ended) == ("filled", 6.0)
    assert (killed.outcome, killed.ended) == ("", None)


def test_the_decisions_follow_from_the_seed() -> None:
    first, again, other = (list(islice(steps(seed, 3), 300)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first != list(islice(steps(1, 4), 300)), "each seat has its own"


def test_a_plan_has_every_operation_every_model_and_every_fault() -> None:
    planned = list(islice(steps(1, 0, fault_rate=0.5), 3000))
    assert {step.operation for step in planned} == OPERATIONS.keys()
    assert {step.model for step in planned} == MODELS.keys()
    assert {step.fault.kind for step in planned if step.fault is not None} == {*INSTANCE_FAULTS, *BROKER_FAULTS}


def test_no_two_models_have_the_same_bytes_before_or_after_they_are_filled() -> None:
    checksums = [found for model in MODELS for found in (right(model), untouched(model))]
    assert len(set(checksums)) == len(checksums)
    assert {name: len(data) for name, data in content("small").items()} == MODELS["small"]
