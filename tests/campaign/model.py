"""What a history must be like: each rule yields a sentence for everything that breaks it. A history without violations
is what docs/RELIABILITY.md promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from campaign import leases
from campaign.history import Call, History, Strike
from campaign.weights import right, untouched
from weight_broker.errors import Reason

Rule = Callable[[History], Iterator[str]]

GUARD_SECONDS = 60.0
"""How much later than its deadline a call may end on a machine that is busy."""
FULL = frozenset({"filled", "loaded", "published"})
"""Outcomes after which the tensors hold the model's content."""
WRITERS = frozenset({"acquire", "acquire_or_load", "lease"})
"""Operations that begin with blank tensors."""
SUCCESSES = FULL | {"attached", "leased", "extended", "give up", "forget", "retracted", "closed"}
FAILURES = frozenset(
    str(reason)
    for reason in (
        Reason.BROKER_UNAVAILABLE,
        Reason.DRAINING,
        Reason.WEIGHTS_NOT_FOUND,
        Reason.ACQUIRE_TIMEOUT,
        Reason.TRANSFER_FAILED,
        Reason.TRANSFER_NOT_FOUND,
        Reason.PUBLISH_REFUSED,
        Reason.LIMIT_EXCEEDED,
        Reason.PUBLICATION_NOT_FOUND,
        Reason.RETRACT_TIMEOUT,
        Reason.LEASE_LOST,
    )
)
"""How a call may fail under faults from outside. Wrong bytes (INTEGRITY_ERROR), a defect (INTERNAL) and a wrong request
of the client are none of them."""

EXCUSED = {
    str(Reason.REGION_REFUSED): frozenset({"broker descriptor shortage"}),
}
"""Failures that only calls meet during which the broker ends or has no descriptors left."""


def violations(history: History) -> list[str]:
    """Everything that must not have happened."""
    return [sentence for rule in RULES for sentence in rule(history)]


def no_wrong_bytes(history: History) -> Iterator[str]:
    for call in history.calls:
        if call.outcome in FULL and call.after != right(call.model):
            yield f"{_name(call)}: {call.outcome} with wrong bytes"
        for model, seen in call.views.items():
            if seen != right(model):
                yield f"{_name(call)}: attached tensors of {model} have wrong bytes"


def untouched_means_untouched(history: History) -> Iterator[str]:
    for call in history.calls:
        left_alone = call.outcome == "leased" or call.outcome in FAILURES
        if left_alone and not call.touched and call.operation in WRITERS and call.after != untouched(call.model):
            yield f"{_name(call)}: says that nothing was touched ({call.outcome}), but bytes changed"


def quiesced_means_quiesced(history: History) -> Iterator[str]:
    """Nothing writes to tensors between two calls, except after a call that says so."""
    last: dict[tuple[str, str], Call] = {}
    for call in history.calls:
        before = last.get((call.process, call.model))
        if before is not None and before.ended is not None and before.quiesced and call.found != before.after:
            yield f"{_name(call)}: tensors changed since call {before.number}, which had ended all writing"
        last[call.process, call.model] = call


def every_call_ends_as_documented(history: History) -> Iterator[str]:
    for call in history.calls:
        if call.ended is None or call.outcome in SUCCESSES | FAILURES:
            continue
        excuses = EXCUSED.get(call.outcome, frozenset())
        if not any(strike.kind in excuses and _overlap(call, strike) for strike in history.strikes):
            yield f"{_name(call)}: ended with {call.outcome!r}: {call.message}"


def no_call_outlives_its_deadline(history: History) -> Iterator[str]:
    for call in history.calls:
        if call.ended is None:
            continue
        stopped = sum(
            strike.until - strike.at
            for strike in history.strikes
            if strike.kind == "stop" and strike.process == call.process
        )
        late = call.ended - call.began - call.timeout - stopped
        if late > GUARD_SECONDS:
            yield f"{_name(call)}: ended {late:.0f} s after its deadline"


def only_the_killed_die(history: History) -> Iterator[str]:
    killed = {strike.process for strike in history.strikes if strike.kind == "kill"}
    for ending in history.endings:
        if ending.status != 0 and not (ending.status == -9 and ending.process in killed):
            yield f"process {ending.process} ended by itself with status {ending.status}"
    for call in history.calls:
        if call.ended is None and call.operation != "die" and call.process not in killed:
            yield f"{_name(call)}: never ended, although its process was not killed"
    started = {call.process for call in history.calls}
    for process in sorted(started - {ending.process for ending in history.endings}):
        yield f"process {process} never ended"


def generations_never_repeat(history: History) -> Iterator[str]:
    published: dict[int, Call] = {}
    for call in history.calls:
        if call.outcome == "published":
            if call.generation in published:
                yield f"{_name(call)}: generation {call.generation} belongs to {_name(published[call.generation])}"
            published[call.generation] = call


def sources_are_of_the_model_and_not_retracted(history: History) -> Iterator[str]:
    models = {call.generation: call.model for call in history.calls if call.outcome == "published"}
    retracted = {call.generation: call for call in history.calls if call.outcome == "retracted"}
    for call in history.calls:
        if call.outcome not in ("filled", "attached"):
            continue
        if models.get(call.generation, call.model) != call.model:
            yield f"{_name(call)}: read generation {call.generation}, which is {models[call.generation]}"
        end = retracted.get(call.generation)
        if end is not None and end.ended is not None and end.ended < call.began:
            yield f"{_name(call)}: read generation {call.generation} after {_name(end)} had returned"


def nothing_is_left(history: History) -> Iterator[str]:
    for name, count in history.remains.items():
        if count:
            yield f"at the end {count} {name} are left"
    if not history.remains:
        yield "it was not looked for what is left at the end"
    for call in history.calls:
        if call.outcome == "closed" and call.left:
            yield f"{_name(call)}: {call.left} pieces of memory are left in the process"


def the_broker_met_no_defect(history: History) -> Iterator[str]:
    for defect in history.defects:
        yield f"the broker's log has a defect: {defect}"


def the_driver_is_used_by_its_rules(history: History) -> Iterator[str]:
    for misuse in history.misuses:
        yield f"a process used the driver against its rules: {misuse}"


def _overlap(call: Call, strike: Strike) -> bool:
    return strike.at <= (call.ended or call.began) and call.began <= strike.until


def _name(call: Call) -> str:
    return f"process {call.process}, call {call.number} ({call.operation} {call.model})"


RULES: tuple[Rule, ...] = (
    no_wrong_bytes,
    untouched_means_untouched,
    quiesced_means_quiesced,
    leases.tokens_only_grow,
    leases.one_holder_at_a_time,
    every_call_ends_as_documented,
    no_call_outlives_its_deadline,
    only_the_killed_die,
    generations_never_repeat,
    sources_are_of_the_model_and_not_retracted,
    nothing_is_left,
    the_broker_met_no_defect,
    the_driver_is_used_by_its_rules,
)
