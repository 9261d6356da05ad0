"""Says in the log what an acquisition waits for: without that a start of many minutes looks like a hang."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weight_broker.v1 import weight_broker_service_pb2 as pb

_REPEAT_SECONDS = 30.0

_logger = logging.getLogger("weight_broker")


@dataclass(frozen=True, slots=True)
class _Wait:
    what: str
    begun: float
    """Monotonic seconds."""

    def __str__(self) -> str:
        return f"{self.what} (began {time.monotonic() - self.begun:.0f} s ago)"


class WaitingLog:
    """What is waited for, at once and then every half a minute, as a warning, until `end`. A thread exists only
    meanwhile, as the caller's waits in gRPC."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._what = ""
        self._ended: threading.Event | None = None

    def note(self, waiting: pb.Waiting) -> None:
        """The broker says what the acquisition waits for."""
        wait = _wait_of(waiting)
        if wait.what == self._what:
            return
        self.end()
        self._what, self._ended = wait.what, threading.Event()
        _logger.info("%s: waiting for %s", self._model, wait)
        repeat = threading.Thread(target=self._repeat, args=(self._ended, wait), daemon=True)
        repeat.name = "weight-broker-waiting"
        with contextlib.suppress(RuntimeError):  # without a thread it is said once
            repeat.start()

    def end(self) -> None:
        """Idempotent."""
        ended, self._ended, self._what = self._ended, None, ""
        if ended is not None:
            ended.set()

    def _repeat(self, ended: threading.Event, wait: _Wait) -> None:
        while not ended.wait(_REPEAT_SECONDS):
            _logger.warning("%s: still waiting for %s", self._model, wait)


def _wait_of(waiting: pb.Waiting) -> _Wait:
    now = time.monotonic()
    try:
        reason = waiting.Reason.Name(waiting.reason)
    except ValueError:  # of a newer broker
        reason = f"reason {waiting.reason}"
    match reason:
        case "REASON_COLD_LOAD":
            lease = waiting.cold_load_lease
            name = f"{lease.instance_name} ({lease.instance_id})" if lease.instance_name else lease.instance_id
            return _Wait(f"the load from disk by {name}", now - lease.age.ToNanoseconds() / 1e9)
        case "REASON_SOURCES_BUSY":
            return _Wait("a free reader slot of a source", now)
        case "REASON_LOAD_GROUP":
            return _Wait("the other ranks of the engine", now)
        case "REASON_REGISTERING":
            return _Wait("a source that is being mapped", now)
        case _:
            return _Wait(reason, now)
