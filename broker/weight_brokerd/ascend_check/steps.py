"""The single steps that `ascend-check` measures, each on its own and without a broker: plain copies, the datasystem's
client between two cards, sharing memory between processes, digests."""

from __future__ import annotations

import json
import secrets
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from weight_broker.cli.failure import CommandError
from weight_broker.demo.process import Answering

_STEP_SECONDS = 600.0
_FETCH_MILLISECONDS = 60_000
_CONNECT_SECONDS = 30.0
_LEAST_BLOB_BYTES = 2 << 20  # the engine gathers smaller ones in a buffer of its own


class StepFailedError(Exception):
    """A step could not be done; the text is the driver's or the engine's."""


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    what: str
    seconds: tuple[float, ...] = ()
    """Of each round; empty if it could not be done."""
    size_bytes: int = 0
    """Moved in each round; 0 if none were."""
    problem: str = ""
    """Why it could not be done."""

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


@dataclass
class Steps:
    """What was measured."""

    rows: list[Row] = field(default_factory=list)

    def failures(self) -> list[Row]:
        """What could not be done."""
        return [row for row in self.rows if row.problem]

    def measure(self, what: str, step: Callable[[], list[float]], size_bytes: int = 0) -> bool:
        """Adds a row; whether it could be done."""
        try:
            self.rows.append(Row(what, tuple(step()), size_bytes))
        except (StepFailedError, CommandError) as error:
            self.rows.append(Row(what, problem=str(error)))
            return False
        return True


class CardProcess(Answering):
    """A process of `weight_brokerd.ascend_check.process`."""

    def __init__(self, name: str, card: int, directory: Path, variables: dict[str, str]) -> None:
        super().__init__(name, ["-m", "weight_brokerd.ascend_check.process", str(card)], directory, **variables)

    def ask(self, step: str, **arguments: Any) -> dict[str, Any]:
        """Does one step. Raises `StepFailedError`, or `CommandError` if the process ends or does not answer."""
        self.tell(json.dumps({"do": step, **arguments}))
        answer = self.next_answer(time.monotonic() + _STEP_SECONDS)
        if answer["event"] == "failed":
            raise StepFailedError(f"{self.name}: {answer['problem']}")
        return answer


def measure(
    cards: tuple[int, int],
    size: int,
    rounds: int,
    worker: tuple[str, int],
    start: Callable[[str, int], CardProcess],
    *,
    by_torch: bool,
) -> Steps:
    """All steps, between two cards. `start` starts a process on a card; `size` is in bytes."""
    steps = Steps()
    blobs = max(1, min(256, size // _LEAST_BLOB_BYTES))
    source, beside, other = start("source", cards[0]), start("beside it", cards[0]), start("destination", cards[1])
    for process in (source, beside, other):
        if not steps.measure(f"open the card ({process.name})", lambda: [process.ask("open")["seconds"]]):  # noqa: B023
            return steps
    for kind, what in (
        ("device", "copy within the card"),
        ("to device", "host to card"),
        ("from device", "card to host"),
    ):
        steps.measure(what, lambda: source.ask("copy", kind=kind, size=size, rounds=rounds)["seconds"], size)  # noqa: B023
    size = source.ask("allocate", name="plain", size=size, blobs=blobs)["size"]
    other.ask("allocate", name="plain", size=size, blobs=blobs)
    steps.measure("digest, on the host", lambda: source.ask("digest", name="plain", rounds=1)["seconds"], size)
    if by_torch:
        steps.measure(
            "digest, by torch on the card",
            lambda: beside.ask("digest_by_torch", size=size, rounds=rounds)["seconds"],
            size,
        )
    connections = [
        steps.measure(f"connect to the datasystem worker ({one.name})", partial(_connect, one, worker))
        for one in (source, beside, other)
    ]
    shown = f"{blobs} blobs"
    connected = all(connections)
    if connected:
        _link(steps, source, other, "plain", f"own memory, {shown}", size, rounds, first=True)
    for name, chunks in (("plain allocation", False), ("chunks", True)):
        _sharing(steps, source, beside, other if connected else None, name, chunks, size, blobs, rounds)
    return steps


def _connect(process: CardProcess, worker: tuple[str, int]) -> list[float]:
    """The time of the attempt that succeeds: a worker that was just started refuses device objects at first."""
    deadline = time.monotonic() + _CONNECT_SECONDS
    while True:
        try:
            answer = process.ask("connect", host=worker[0], port=worker[1])
        except StepFailedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1.0)
        else:
            return [answer["seconds"] + answer["warm_up_seconds"]]


def _link(
    steps: Steps, source: CardProcess, other: CardProcess, name: str, what: str, size: int, rounds: int, *, first: bool
) -> None:
    """dev_mset and dev_mget under a fresh key each time, as the broker does it. The `first` between two processes sets
    a communicator up. What arrives is compared once."""
    offers: list[float] = []
    fetches: list[float] = []

    def transfer() -> None:
        key = f"ascend-check-{secrets.token_hex(16)}"
        offers.append(source.ask("offer", name=name, key=key)["seconds"])
        try:
            fetches.append(other.ask("fetch", name="plain", key=key, timeout_ms=_FETCH_MILLISECONDS)["seconds"])
        finally:
            with suppress(StepFailedError):
                source.ask("withdraw", key=key)

    def compared() -> list[float]:
        transfer()
        if source.ask("content", name=name)["digest"] != other.ask("content", name="plain")["digest"]:
            raise StepFailedError("the bytes that arrived are other bytes")
        return fetches[:]

    def more() -> list[float]:
        for _ in range(rounds):
            transfer()
        return fetches[1:]

    if not steps.measure(f"first dev_mget, {what}; bit-exact", compared, size):
        return
    if steps.measure(f"dev_mget, {what}", more, size):
        if first:
            set_up = max(fetches[0] - steps.rows[-1].median, 0.0)
            steps.rows.append(Row(f"communicator, {what}: first minus median", (set_up,)))
        steps.rows.append(Row(f"dev_mset, {what}", tuple(offers)))


def _sharing(
    steps: Steps,
    source: CardProcess,
    beside: CardProcess,
    other: CardProcess | None,
    what: str,
    chunks: bool,
    size: int,
    blobs: int,
    rounds: int,
) -> None:
    """Exports memory of one process, maps it in another one on the same card, and sends it from there."""
    exports, imports, unmaps, ends = [], [], [], []
    regions: list[dict[str, Any]] = []

    def once(keep: bool) -> None:
        answer = source.ask("export", name=what)
        regions[:] = answer["regions"]
        exports.append(answer["seconds"])
        try:
            imports.append(beside.ask("import_", name=what, regions=regions, blobs=blobs)["seconds"])
        except StepFailedError:
            source.ask("unexport", name=what)
            raise
        if not keep:
            unmaps.append(beside.ask("unimport", regions=regions)["seconds"])
            ends.append(source.ask("unexport", name=what)["seconds"])

    def all_rounds() -> list[float]:
        source.ask("allocate", name=what, size=size, blobs=blobs, chunks=chunks)
        for number in range(rounds):
            once(keep=number == rounds - 1)
        return imports

    if not steps.measure(f"import, {what}", all_rounds):
        return
    steps.rows.append(Row(f"export, {what}", tuple(exports)))
    if other is not None:
        _link(steps, beside, other, what, f"another process's {what}", size, rounds, first=not chunks)

    def undo() -> list[float]:
        unmaps.append(beside.ask("unimport", regions=regions)["seconds"])
        ends.append(source.ask("unexport", name=what)["seconds"])
        return unmaps

    if steps.measure(f"unmap, {what}", undo):
        steps.rows.append(Row(f"end of the export, {what}", tuple(ends)))
