"""A worker directory belongs to one broker; a worker that a killed broker left behind is killed.

The kernel kills a worker with its broker (`launch`). This module waits for that end, and kills a worker that survived.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import select
import signal
from pathlib import Path

import structlog

from weight_brokerd.config.errors import StartError
from weight_brokerd.processes.start_time import start_time

log = structlog.get_logger()
_LOCK = "lock"
_RECORD = "worker.pid"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_POLL_SECONDS = 0.05


class WorkerDirectory:
    """A directory for one managed worker at a time, held until `close`."""

    def __init__(self, path: Path) -> None:
        """Creates and locks the directory. Raises StartError."""
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StartError(
                f"datasystem.directory: {path} cannot be made or written: {error.strerror}. Give it to uid "
                f"{os.geteuid()}, or set another directory"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise StartError(
                f"datasystem.directory: another broker has its datasystem worker in {path}. Set another directory, or "
                "use that worker: datasystem.managed = false and datasystem.worker_address"
            ) from None

    def record(self, pid: int) -> None:
        """Remembers the worker for the next broker."""
        record = {"pid": pid, "start_time": start_time(pid), "boot_id": _boot_id()}
        fresh = self.path / f"{_RECORD}.new"
        fresh.write_text(json.dumps(record))
        fresh.replace(self.path / _RECORD)

    def forget(self) -> None:
        """The worker has ended."""
        (self.path / _RECORD).unlink(missing_ok=True)

    async def end_leftover(self, seconds: float) -> bool:
        """Kills the recorded worker if it still runs; False if it has not ended within `seconds`."""
        pidfd = self._open_leftover()
        if pidfd is None:
            self.forget()
            return True
        try:
            log.warning("datasystem_worker_left_behind", directory=str(self.path), action="killed")
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            if not await _ended(pidfd, seconds):
                return False
        finally:
            os.close(pidfd)
        self.forget()
        return True

    def close(self) -> None:
        """Unlock the directory for other brokers. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _open_leftover(self) -> int | None:
        """A pidfd of the recorded process; None if it has ended, also if its pid was reused."""
        try:
            record = json.loads((self.path / _RECORD).read_text())
            pid, begun, boot_id = int(record["pid"]), int(record["start_time"]), record["boot_id"]
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):  # no record, or a damaged one
            return None
        if boot_id != _boot_id():
            return None
        with contextlib.suppress(OSError, OverflowError):
            pidfd = os.pidfd_open(pid)
            with contextlib.suppress(OSError):
                if start_time(pid) == begun:
                    return pidfd
            os.close(pidfd)
        return None


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


async def _ended(pidfd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    deadline = asyncio.get_running_loop().time() + seconds
    while not poll.poll(0):
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(_POLL_SECONDS)
    return True
