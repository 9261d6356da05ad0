"""What a row of the contract is, and how it is run."""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from weight_brokerd.ascend_check.contract.driver import Call, NotRun, Scene


class _AnyError:
    """Equal to every code but 0: which one it is, the source does not say."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, int) and other != 0

    def __hash__(self) -> int:
        return 1

    def __repr__(self) -> str:
        return "refused"


class _Anything:
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 2


REFUSED = _AnyError()
_ANYTHING = _Anything()


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Assumed:
    """The source does not say; the worse is assumed. The double shows it, and a machine may be kinder."""

    worse: object

    def __eq__(self, other: object) -> bool:
        return self.worse == other

    def __hash__(self) -> int:
        return 3

    def __repr__(self) -> str:
        return f"unknown, {self.worse!r} is assumed"


class _Unknown(Assumed):
    """The source says nothing, and nothing is assumed: the value is what the row is run for."""

    def __repr__(self) -> str:
        return "unknown"


UNKNOWN = _Unknown(worse=float("nan"))
"""Equal to nothing, so that it is always recorded."""


class Verdict(enum.StrEnum):
    """What a run shows."""

    AS_SOURCE = "as the source"
    UNLIKE_SOURCE = "UNLIKE the source"
    RECORDED = "recorded"
    """What the source says is so, and what it does not say is an answer that was unknown."""
    NOT_RUN = "not run"


def verdict_of(expected: object, seen: object) -> Verdict:
    """Of a row that came to its end."""
    if expected == seen:
        return Verdict.AS_SOURCE
    return Verdict.RECORDED if _as_stated(expected) == seen else Verdict.UNLIKE_SOURCE


def _as_stated(expected: object) -> object:
    """Without what is only assumed."""
    if isinstance(expected, tuple):
        return tuple(_as_stated(part) for part in expected)
    return _ANYTHING if isinstance(expected, Assumed) else expected


@dataclass(frozen=True, slots=True)
class Row:
    """A rule of the driver."""

    identity: str
    functions: tuple[str, ...]
    """The calls that it is about."""
    done: str
    """Precondition, arguments, and what is looked at, in order."""
    expected: object
    """What the source says is seen: codes and values, in the order of `done`."""
    source: str
    """file:line@tag, header, document, user's issue, or "unknown: the worse is assumed"."""
    needed_by: str
    """What in the product depends on it."""
    context: str
    """Which threads may call."""
    owner: str
    """Who gives back what, and when."""
    since: str
    body: Callable[[Scene], object]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A row that was run."""

    row: Row
    verdict: Verdict
    seen: str
    calls: tuple[Call, ...] = ()


def rows() -> tuple[list[Row], Callable[..., Callable[[Callable[[Scene], object]], Callable[[Scene], object]]]]:
    """A list of rows, and the decorator that makes a function the body of one more."""
    made: list[Row] = []

    def row(
        identity: str,
        *functions: str,
        done: str,
        expected: object,
        source: str,
        needed_by: str,
        context: str = "any thread",
        owner: str = "",
        since: str = "8.5",
    ) -> Callable[[Callable[[Scene], object]], Callable[[Scene], object]]:
        def decorate(body: Callable[[Scene], object]) -> Callable[[Scene], object]:
            made.append(Row(identity, functions, done, expected, source, needed_by, context, owner, since, body))
            return body

        return decorate

    return made, row


def run(row: Row, environment: Mapping[str, str] | None = None) -> Outcome:
    """Runs the row in processes of its own."""
    with Scene(os.environ if environment is None else environment) as scene:
        try:
            seen = row.body(scene)
        except NotRun as why:
            return Outcome(row, Verdict.NOT_RUN, str(why), tuple(scene.calls))
        return Outcome(row, verdict_of(row.expected, seen), repr(seen), tuple(scene.calls))
