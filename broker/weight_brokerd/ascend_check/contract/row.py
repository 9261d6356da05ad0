"""What a row of the contract is, and how it is run."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from weight_brokerd.ascend_check.contract.driver import NotRun, Scene


class _AnyError:
    """Equal to every code but 0: which one it is, the source does not say."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, int) and other != 0

    def __hash__(self) -> int:
        return 1

    def __repr__(self) -> str:
        return "refused"


REFUSED = _AnyError()


class Verdict(enum.StrEnum):
    """What a run shows."""

    AS_SOURCE = "as the source"
    UNLIKE_SOURCE = "UNLIKE the source"
    NOT_RUN = "not run"


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
    try:
        with Scene(environment) as scene:
            seen = row.body(scene)
    except NotRun as why:
        return Outcome(row, Verdict.NOT_RUN, str(why))
    return Outcome(row, Verdict.AS_SOURCE if row.expected == seen else Verdict.UNLIKE_SOURCE, repr(seen))
