"""What a row of the contract is, and how a row is run."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from weight_brokerd.proof.processes import NotRun, Scene

S = TypeVar("S", bound=Scene)
Body = Callable[[S], object]


class _AnyError:
    """Equal to every code but 0, for sources that do not name the code."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, int) and not isinstance(other, bool) and other != 0

    def __hash__(self) -> int:
        return 1

    def __repr__(self) -> str:
        return "refused"


REFUSED = _AnyError()
UNKNOWN = "unknown: the worse is assumed"
"""Begins the source of a row that only hardware decides."""


class Verdict(enum.StrEnum):
    """What a run shows."""

    AS_SOURCE = "as the source"
    UNLIKE_SOURCE = "unlike the source"
    NOT_RUN = "not run"


@dataclass(frozen=True, slots=True)
class Row(Generic[S]):
    """A rule of a driver."""

    identity: str
    functions: tuple[str, ...]
    """The calls that the rule is about."""
    done: str
    """Precondition, arguments, and what is looked at, in order."""
    expected: object
    """What the source says is seen: codes and values, in the order of `done`."""
    source: str
    """file:line@tag, header, document, a user's issue, or `UNKNOWN` and what is known."""
    needed_by: str
    """What in the product depends on the rule."""
    context: str
    """Which threads may call."""
    owner: str
    """Who gives back what, and when."""
    since: str
    body: Body[S]

    @property
    def is_open(self) -> bool:
        """Whether no source says what is expected: then no verdict is a fault."""
        return self.source.startswith(UNKNOWN)


@dataclass(frozen=True, slots=True)
class Outcome(Generic[S]):
    """A row that was run."""

    row: Row[S]
    verdict: Verdict
    seen: str

    @property
    def is_fault(self) -> bool:
        """Whether the product may fail here because it relies on the source."""
        return self.verdict is Verdict.UNLIKE_SOURCE and not self.row.is_open


class Table(Generic[S]):
    """Rows in the order in which their bodies are defined."""

    def __init__(self, since: str) -> None:
        """`since`: the version from which on rows hold that name none."""
        self.rows: list[Row[S]] = []
        self._since = since

    def row(
        self,
        identity: str,
        *functions: str,
        done: str,
        expected: object,
        source: str,
        needed_by: str,
        context: str = "any thread",
        owner: str = "",
        since: str = "",
    ) -> Callable[[Body[S]], Body[S]]:
        """Makes a function the body of a row."""

        def decorate(body: Body[S]) -> Body[S]:
            begins = since or self._since
            self.rows.append(Row(identity, functions, done, expected, source, needed_by, context, owner, begins, body))
            return body

        return decorate


def run(row: Row[S], scene: S) -> Outcome[S]:
    """Runs the row in the processes of a fresh scene, and ends them."""
    try:
        with scene:
            seen = row.body(scene)
    except NotRun as why:
        return Outcome(row, Verdict.NOT_RUN, str(why))
    return Outcome(row, Verdict.AS_SOURCE if row.expected == seen else Verdict.UNLIKE_SOURCE, repr(seen))
