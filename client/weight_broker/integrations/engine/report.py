"""The report of one load."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_START_TIME_AFTER_NAME = 19
"""Place of the field `starttime` among those behind the name. [proc_pid_stat(5)]"""


@dataclass(slots=True)
class EngineLoad:
    """One model of this process, as it was loaded. Times in seconds."""

    model: str
    source: str = "disk"
    """Where the weights came from: "peer" or "disk"."""
    path: str = ""
    """How weights of a peer arrived: "copy", "zero_copy" (mapped copy-on-write) or "staged"."""
    weight_set_id: str = ""
    """Empty if no key could be made."""
    source_publication_id: str = ""
    """The publication that was read, if the weights came from a peer."""
    source_generation: int = 0
    """Its generation."""
    size_bytes: int = 0
    """Bytes of the weight set."""
    tensor_count: int = 0
    """Tensors of the weight set."""
    verified: str = ""
    """How much was verified on arrival."""
    acquire_error: str = ""
    """Why the weights did not come from a peer, if that failed."""
    publication_id: str = ""
    """The publication of this process; empty if there is none."""
    not_published: str = ""
    """Why this process has no publication."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By step. The loader: key, acquire, load, check, publish. The engine, as far as the loader sees them: `process`
    (from the start of the process to the first load), `make` (the model, without weights), `post_process`."""

    def summary(self) -> str:
        """One line for the log."""
        verified = f" (verified: {self.verified})" if self.verified else ""
        times = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in self.seconds.items())
        offered = f"offered as {self.publication_id}" if self.publication_id else f"not offered: {self.not_published}"
        how = f" by {self.path}" if self.path else ""
        return (
            f"loaded {self.model} from {self.source}{how}: weight set {self.weight_set_id or 'unknown'}, "
            f"{self.tensor_count} tensors, {self.size_bytes} bytes{verified}; {times}; {offered}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For logs and other processes."""
        return asdict(self)


def process_seconds() -> float:
    """Seconds since this process was started, in clock ticks of the kernel (10 ms). Raises `OSError`."""
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[_START_TIME_AFTER_NAME]) / os.sysconf("SC_CLK_TCK")
