"""What happened in a campaign: each process writes a line before and after everything it does, which survives kill -9.

Times are seconds of CLOCK_MONOTONIC, which all processes of a host share.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Call:
    """One operation of one process."""

    process: str
    """The seat and its how many-th process: "3.2"."""
    number: int
    operation: str
    model: str
    timeout: float
    began: float
    ended: float | None = None
    """None: the process ended first."""
    outcome: str = ""
    """`filled`, `loaded`, `leased`, `attached`, `published`, ... or the reason of a `BrokerError`; `crashed` for any
    other exception."""
    message: str = ""
    found: str = ""
    """Checksum of the model's tensors in this process before the call; empty if it has none."""
    after: str = ""
    """The same after the call."""
    views: Mapping[str, str] = field(default_factory=dict)
    """Checksums of all attached tensors after the call, by model."""
    touched: bool = False
    quiesced: bool = True
    fencing_token: int = 0
    expires_at: float = 0.0
    loading_since: float = 0.0
    """When the load from disk began, within `acquire_or_load`."""
    loaded_at: float = 0.0
    """When it ended."""
    has_lease: bool = False
    """Whether that load was by right of a lease: the acquisition did not fail."""
    generation: int = 0
    """Of the publication that was made, read or retracted."""
    left: int = 0
    """Pieces of memory that the process has open, mapped or exported after `close`."""


@dataclass(frozen=True)
class Strike:
    """One fault. `process` is "broker" or an instance's."""

    kind: str
    process: str
    at: float
    until: float


@dataclass(frozen=True)
class Ending:
    """The end of a process."""

    process: str
    status: int
    at: float


@dataclass(frozen=True)
class History:
    """A whole campaign."""

    calls: tuple[Call, ...]
    strikes: tuple[Strike, ...] = ()
    endings: tuple[Ending, ...] = ()
    remains: Mapping[str, int] = field(default_factory=dict)
    """What is left after everything ended, by name: all 0."""
    defects: tuple[str, ...] = ()
    """What the broker's log shows of defects."""
    misuses: tuple[str, ...] = ()
    """What the emulated driver saw of processes that used it against its rules."""

    def of_process(self, process: str) -> list[Call]:
        """The calls of a process, in order."""
        return [call for call in self.calls if call.process == process]


class Recorder:
    """Appends lines to a file; a line is one write(2)."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)

    def write(self, event: str, **values: Any) -> None:
        os.write(self._descriptor, (json.dumps({"event": event, **values}) + "\n").encode())


def read(directory: Path) -> History:
    """The history that the processes of a campaign wrote into `directory`."""
    calls: dict[tuple[str, int], dict[str, Any]] = {}
    others: dict[str, list[dict[str, Any]]] = {"strike": [], "ending": [], "remains": [], "defect": [], "misuse": []}
    for values in _lines(directory):
        event = values.pop("event")
        if event == "call":
            calls.setdefault((values["process"], values["number"]), {}).update(values)
        else:
            others[event].append(values)
    return History(
        calls=tuple(sorted((Call(**call) for call in calls.values()), key=lambda call: call.began)),
        strikes=tuple(Strike(**strike) for strike in others["strike"]),
        endings=tuple(Ending(**ending) for ending in others["ending"]),
        remains={name: count for remains in others["remains"] for name, count in remains.items()},
        defects=tuple(defect["text"] for defect in others["defect"]),
        misuses=tuple(misuse["text"] for misuse in others["misuse"]),
    )


def now() -> float:
    return time.monotonic()


def _lines(directory: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(directory.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue  # the process was killed while it wrote its last line
