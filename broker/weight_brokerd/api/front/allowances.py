"""How much each process may send over the gRPC socket: what it sends beyond stays in its sockets."""

from __future__ import annotations

from collections.abc import Callable

from weight_brokerd.api.front.frames import FrameCounter
from weight_brokerd.core.conduct.pace import Pace, Paces
from weight_brokerd.core.model import Process

FRAME_PACE = Pace(per_second=4000, burst=8000)
"""Of HTTP/2, which are up to 16 KiB of a request. A call takes five; a read that has none counts as one."""
_PACES_KEPT = 1024


class Allowances:
    """Of all processes."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.overrun: Callable[[Process], float] = lambda process: 0.0
        """Seconds for which the broker reads nothing of a process for another reason."""
        self._clock = clock
        self._frames = Paces(FRAME_PACE)

    def of(self, process: Process) -> ConnectionAllowance:
        """For a connection; all of a process share what it may send."""
        if len(self._frames) > _PACES_KEPT:
            self._frames.tidy(self._clock())
        return ConnectionAllowance(self, process)

    def wait(self, process: Process) -> float:
        """Seconds until the process may send; 0 if it may now."""
        return max(self._frames.wait(process, self._clock()), self.overrun(process))

    def spend(self, process: Process, frames: int) -> None:
        """So many were read at once."""
        self._frames.spend(process, self._clock(), max(1, frames))


class ConnectionAllowance:
    """What may be read of one connection (`weight_brokerd.api.front.relay.Allowance`)."""

    def __init__(self, allowances: Allowances, process: Process) -> None:
        self._allowances = allowances
        self._process = process
        self._frames = FrameCounter()

    def wait(self) -> float:
        """See `Allowance`."""
        return self._allowances.wait(self._process)

    def spend(self, content: memoryview) -> None:
        """See `Allowance`."""
        self._allowances.spend(self._process, self._frames.count(content))
