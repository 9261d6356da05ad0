"""One broker for each runtime directory.

gRPC silently takes over the socket path of a live server, and the old server's stop then removes the new one's socket.
So the lock is acquired before a socket is bound, and held until the process ends. The file is never removed: it also
has the end of the generations in use (`identity.generation_range`), which must survive a crash.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
from pathlib import Path
from types import TracebackType

from weight_broker.runtime_directory import ATTACH_SOCKET, LOCK_FILE

# One record of fixed width, written in one call: a kill at any moment leaves either the old or the new one.
_RECORD = "pid {pid:010d} generation {generation:020d}\n"
_RECORD_PATTERN = re.compile(rb"pid (\d{10}) generation (\d{20})\n")
_RECORD_BYTES = len(_RECORD.format(pid=0, generation=0))


class AlreadyRunningError(RuntimeError):
    """Another broker has the runtime directory. `pid` is its process id, 0 if it is not known."""

    def __init__(self, directory: Path, pid: int) -> None:
        who = f"process {pid}" if pid else "another process"
        super().__init__(
            f"a broker already runs in {directory}: {who}. Stop it, or give this one another broker.runtime_directory"
        )
        self.pid = pid


class RuntimeLock:
    """Holds the lock file of a runtime directory."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def take(cls, directory: Path) -> RuntimeLock:
        """Takes the lock; raises `AlreadyRunningError`, or `OSError` if the file cannot be made. Never waits."""
        path = directory / LOCK_FILE
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
            lock = cls(descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = lock._record()[0]
                lock.close()
                raise AlreadyRunningError(directory, pid) from None
            if _is_current(path, descriptor):
                break
            lock.close()  # the file was replaced between open and lock; a lock on the old file excludes no broker
        # A cleaner of /tmp may have removed the file of a running broker. A live socket shows that broker.
        if _answers(directory / ATTACH_SOCKET):
            lock.close()
            raise AlreadyRunningError(directory, 0)
        return lock

    def generation_mark(self) -> int:
        """The first generation that no earlier broker in this directory can have used; 0 if there was none."""
        return self._record()[1]

    def write(self, generation_mark: int) -> None:
        """Records this process and the mark for the next broker."""
        try:
            os.pwrite(self._descriptor, _RECORD.format(pid=os.getpid(), generation=generation_mark).encode(), 0)
        except OSError as error:
            raise OSError(error.errno, f"the lock file in the runtime directory: {error.strerror}") from error
        os.ftruncate(self._descriptor, _RECORD_BYTES)

    def close(self) -> None:
        """Releases the lock. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> RuntimeLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _record(self) -> tuple[int, int]:
        match = _RECORD_PATTERN.match(os.pread(self._descriptor, _RECORD_BYTES, 0))
        return (int(match[1]), int(match[2])) if match else (0, 0)


def _is_current(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except BlockingIOError:
            return True  # the queue is full: the broker is alive
        except OSError:
            return False
        return True
