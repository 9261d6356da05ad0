"""A seat: one instance at a time, which does the steps of the plan; a process that ended is followed by another one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from campaign.faults import Faults
from campaign.history import Recorder, now
from campaign.plan import Step

GUARD_SECONDS = 120.0
"""How long a seat waits for an answer before it takes its process for hung, which the model then rejects."""
OPERATIONS_WITHOUT_BROKER = 4
"""While no broker runs, every so manieth operation is done nevertheless; the others would all fail at once."""


class Actor:
    """One process of `campaign.actor`."""

    def __init__(self, process: str, memory: str, card: int, directory: Path, environment: Mapping[str, str]) -> None:
        self.process = process
        connection, theirs = socket.socketpair()
        self._switch, their_switch = socket.socketpair()
        arguments = [str(theirs.fileno()), str(their_switch.fileno()), process, memory, str(card), str(directory)]
        with theirs, their_switch, (directory / f"{process}.log").open("wb") as log:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "campaign.actor", *arguments],
                pass_fds=[theirs.fileno(), their_switch.fileno()],
                env={**os.environ, **environment, "PYTHONPATH": str(Path(__file__).parents[1])},
                stdin=subprocess.DEVNULL,
                stderr=log,
            )
        self._connection = Connection(connection.detach())
        self.pid = self._popen.pid

    def begin(self, step: Step) -> None:
        with suppress(OSError):  # it has ended: `answers` says so
            self._connection.send(step)

    def answers(self) -> bool:
        """Waits for the end of a step; False if the process ended or hangs."""
        if not self._connection.poll(GUARD_SECONDS):
            return False
        try:
            self._connection.recv()
        except (EOFError, OSError):
            return False
        return True

    def kill(self) -> None:
        self._popen.kill()

    def hang_up(self, which: bytes) -> None:
        with suppress(OSError):  # it has ended
            self._switch.send(which)

    def end(self) -> int:
        """Lets it end by itself, or ends it if it hangs; returns its status."""
        self._connection.close()
        self._switch.close()
        try:
            return self._popen.wait(GUARD_SECONDS)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            return self._popen.wait()


class Seat:
    """Runs in a thread of the campaign."""

    def __init__(
        self, number: int, memory: str, directory: Path, environment: Mapping[str, str], recorder: Recorder
    ) -> None:
        self._number = number
        self._memory = memory
        self._directory = directory
        self._environment = environment
        self._recorder = recorder
        self._actor: Actor | None = None
        self._count = 0

    def run(self, steps: Iterable[Step], faults: Faults, over: threading.Event) -> None:
        """Does the steps until the campaign is over, then leaves as a well-behaved instance does."""
        last = 0
        for step in steps:
            if over.is_set():
                break
            if step.number % OPERATIONS_WITHOUT_BROKER:
                faults.wait_for_broker()
            self._take(step, faults)
            last = step.number
        self._take(Step(last + 1, "close", "tiny", timeout=60.0), None)
        self._end()

    def _take(self, step: Step, faults: Faults | None) -> None:
        actor = self._actor = self._actor or self._start()
        actor.begin(step)
        if step.fault is not None and faults is not None:
            faults.strike(step.fault, actor)
        if not actor.answers():
            self._end()

    def _start(self) -> Actor:
        self._count += 1
        process = f"{self._number}.{self._count}"
        return Actor(process, self._memory, self._number, self._directory, self._environment)

    def _end(self) -> None:
        actor, self._actor = self._actor, None
        if actor is not None:
            status = actor.end()
            self._recorder.write("ending", process=actor.process, status=status, at=now())
