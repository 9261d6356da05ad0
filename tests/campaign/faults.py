"""What goes wrong from outside: signals, cut connections, limits of the kernel. No process takes part in its own fault,
except that an instance cuts its own connections."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from campaign.history import Recorder, now
from campaign.plan import Fault
from support.broker_process import BrokerProcess

MEMORY_FILE_BYTES = 3 << 19
"""As large as a memory file can become in a shortage: less than the larger models need."""


class Victim(Protocol):
    """An instance of a campaign."""

    process: str
    pid: int

    def kill(self) -> None: ...

    def hang_up(self, which: bytes) -> None: ...


class Faults:
    """Strikes instances and the broker, and writes each strike down."""

    def __init__(self, broker: BrokerProcess, recorder: Recorder, *, memory: str) -> None:
        """Files stand in for a card's memory: there a limit on files would take what a card does not."""
        self._broker = broker
        self._recorder = recorder
        self._lock = threading.Lock()
        """The broker has one fault at a time."""
        self._broker_runs = threading.Event()
        self._broker_runs.set()
        self._on_instance: dict[str, Callable[[Victim, Fault], None]] = {
            "kill": lambda victim, fault: victim.kill(),
            "stop": lambda victim, fault: _pause(victim.pid, fault.seconds),
            "hang up attach": lambda victim, fault: victim.hang_up(b"a"),
            "hang up grpc": lambda victim, fault: victim.hang_up(b"g"),
        }
        if memory == "host":
            self._on_instance["memory shortage"] = _lack_memory
        self._on_broker: dict[str, Callable[[Fault], None]] = {
            "broker kill": self._kill_broker,
            "broker terminate": self._terminate_broker,
            "broker stop": lambda fault: _pause(self._broker.pid, fault.seconds),
            "broker disk full": self._fill_disk,
            "broker descriptor shortage": self._lack_descriptors,
        }

    def strike(self, fault: Fault, victim: Victim) -> None:
        """Returns when the fault is over."""
        time.sleep(fault.after)
        if fault.kind not in self._on_instance | self._on_broker:
            return
        if fault.kind in self._on_instance:
            with self._recorded(fault, victim.process):
                self._on_instance[fault.kind](victim, fault)
            return
        with self._lock, self._recorded(fault, "broker"):
            self._on_broker[fault.kind](fault)

    def wait_for_broker(self) -> None:
        """Until a broker that was ended has a successor."""
        self._broker_runs.wait()

    def _kill_broker(self, fault: Fault) -> None:
        with self._away(fault):
            self._broker.kill()

    def _terminate_broker(self, fault: Fault) -> None:
        with self._away(fault):
            status = self._broker.terminate()
            if status != 0:
                self._recorder.write("ending", process="broker", status=status, at=now())

    @contextmanager
    def _away(self, fault: Fault) -> Iterator[None]:
        """The broker ends, and another one follows."""
        self._expect_running()
        self._broker_runs.clear()
        try:
            yield
            time.sleep(fault.seconds)
            self._broker.start()
        finally:
            self._broker_runs.set()

    def _fill_disk(self, fault: Fault) -> None:
        """The log's file cannot grow."""
        with _limited(self._broker.pid, resource.RLIMIT_FSIZE, 0):
            time.sleep(fault.seconds)

    def _lack_descriptors(self, fault: Fault) -> None:
        """The broker can open no more than it has open now."""
        highest = max(int(entry.name) for entry in Path(f"/proc/{self._broker.pid}/fd").iterdir())
        with _limited(self._broker.pid, resource.RLIMIT_NOFILE, highest + 1):
            time.sleep(fault.seconds)

    def _expect_running(self) -> None:
        assert self._broker.process is not None
        status = self._broker.process.poll()
        if status is not None:
            self._recorder.write("ending", process="broker", status=status, at=now())

    @contextmanager
    def _recorded(self, fault: Fault, process: str) -> Iterator[None]:
        at = now()
        try:
            yield
        finally:
            self._recorder.write("strike", kind=fault.kind, process=process, at=at, until=now())


def _lack_memory(victim: Victim, fault: Fault) -> None:
    """Memory files of more than some bytes cannot be made: what a limit on memory does to a publication."""
    with _limited(victim.pid, resource.RLIMIT_FSIZE, MEMORY_FILE_BYTES):
        time.sleep(fault.seconds)


def _pause(pid: int, seconds: float) -> None:
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def _limited(pid: int, which: int, soft: int) -> Iterator[None]:
    """The soft limit of a process, for a while."""
    before = resource.prlimit(pid, which)
    resource.prlimit(pid, which, (soft, before[1]))
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # it ended meanwhile
            resource.prlimit(pid, which, before)
