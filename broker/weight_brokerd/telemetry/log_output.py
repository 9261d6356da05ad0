"""The way of log lines to standard error: a bounded queue and a thread that writes it.

A pipe that nothing reads, a collector that stopped or a full disk must stop no broker: `write` never waits. Lines that
find no room are dropped, counted, and mentioned in the log where they are missing.
"""

from __future__ import annotations

import io
import os
import select
import threading
from collections import deque
from collections.abc import Callable

QUEUED_BYTES = 4 << 20
"""What the queue holds: some ten thousand lines."""
LAST_LINES_SECONDS = 1.0
"""For the last lines at the end of the process, if standard error takes them."""
_WRITE_BYTES = 64 << 10


class LogOutput:
    """Writes whole lines to a descriptor. Any thread may write."""

    def __init__(
        self, descriptor: int, describe_gap: Callable[[int], bytes], *, queued_bytes: int = QUEUED_BYTES
    ) -> None:
        """`describe_gap`: the line, with its newline, that stands for so many dropped lines."""
        self._descriptor = descriptor
        self._queued_bytes = queued_bytes
        self.describe_gap = describe_gap
        self.dropped = 0
        """Lines that were dropped since the start."""
        self._gap = 0
        self._size = 0
        self._lines: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._is_failing = False
        """Whether the last write failed: a line about the gap would only be lost too."""
        self._thread: threading.Thread | None = None

    def write(self, line: bytes) -> None:
        """Queue a line, with its newline; never waits for the descriptor."""
        with self._changed:
            if self._is_closing or self._size + len(line) > self._queued_bytes or not self._is_running():
                self._drop(1)
                return
            if not self._is_failing:
                self._fill_gap()
            self._append(line)
            self._changed.notify()

    def close(self, seconds: float = LAST_LINES_SECONDS) -> bool:
        """Write what is queued, for at most so many seconds; False if that was not enough. Idempotent."""
        with self._changed:
            was_closing, self._is_closing = self._is_closing, True
            self._changed.notify()
            thread = self._thread
        if thread is None:
            return True
        thread.join(seconds if not was_closing else 0)
        return not thread.is_alive()

    def _is_running(self) -> bool:
        """Start the thread with the first line: a process that logs nothing needs none."""
        if self._thread is None:
            # The end of the process does not wait for it: it may be stuck in a write for ever.
            thread = threading.Thread(target=self._run, name="log", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no thread can be started now; the next line tries again
                return False
            self._thread = thread
        return True

    def _append(self, line: bytes) -> None:
        self._lines.append(line)
        self._size += len(line)

    def _drop(self, lines: int) -> None:
        self.dropped += lines
        self._gap += lines

    def _fill_gap(self) -> None:
        if self._gap:
            self._append(self.describe_gap(self._gap))
            self._gap = 0

    def _run(self) -> None:
        while lines := self._next():
            written = self._write_lines(lines)
            if written < len(lines):
                with self._changed:
                    self._drop(len(lines) - written)

    def _next(self) -> list[bytes]:
        """The lines to write now; empty at the end."""
        with self._changed:
            if not self._lines and not self._is_failing:
                self._fill_gap()
            while not self._lines and not self._is_closing:
                self._changed.wait()
            found: list[bytes] = []
            size = 0
            while self._lines and (not found or size + len(self._lines[0]) <= _WRITE_BYTES):
                size += len(self._lines[0])
                found.append(self._lines.popleft())
            self._size -= size
            return found

    def _write_lines(self, lines: list[bytes]) -> int:
        """How many lines are written, the last perhaps in part."""
        rest = memoryview(b"".join(lines))
        try:
            while rest:
                try:
                    rest = rest[os.write(self._descriptor, rest) :]
                except BlockingIOError:  # another process made the pipe non-blocking
                    _await_room(self._descriptor)
        except OSError:  # closed, or its reader is gone, or the disk is full: it may be better later
            self._is_failing = True
            return _whole_lines(lines, sum(map(len, lines)) - len(rest))
        self._is_failing = False
        return len(lines)


class LogStream(io.TextIOBase):
    """In place of `sys.stderr`: what Python or a library prints there must not wait either."""

    def __init__(self, output: LogOutput) -> None:
        super().__init__()
        self._output = output
        self._partial = threading.local()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        whole = getattr(self._partial, "text", "") + text
        *lines, self._partial.text = whole.split("\n")
        for line in lines:
            self._output.write(encoded(line))
        return len(text)


def encoded(line: str) -> bytes:
    """A line with its newline. Text that is not Unicode, of a file name for example, is escaped."""
    return (line + "\n").encode("utf-8", "backslashreplace")


def _await_room(descriptor: int) -> None:
    poller = select.poll()
    poller.register(descriptor, select.POLLOUT)
    poller.poll()


def _whole_lines(lines: list[bytes], written: int) -> int:
    count = 0
    for line in lines:
        written -= len(line)
        if written < 0:
            break
        count += 1
    return count
