"""What this process has room for: a thread or a descriptor that it lacks is an error, found before anything begins."""

from __future__ import annotations

import _thread
import contextlib
import mmap
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from weight_broker.errors import BrokerUnavailable

_THREADS = "raise the limit of its container or service (pids.max, TasksMax), or `ulimit -u`, or free memory"
_DESCRIPTORS = "raise its limit of open files (LimitNOFILE, `ulimit -n`)"
_ADDRESS_SPACE = "raise its limit of address space (LimitAS, `ulimit -v`), or free memory"

# What gRPC takes when it starts (1.85: a thread for each processor from 4 to 16, two more; four descriptors and a
# socket), and some more: other threads of this process start things too.
_THREAD_BOUNDS = 4, 16
_MORE_THREADS = 4
_DESCRIPTOR_COUNT = 8
_ADDRESS_SPACE_BYTES = 256 << 20
_MAP_NORESERVE = 0x4000
_THREAD_END_SECONDS = 1.0


def start(thread: threading.Thread) -> None:
    """Raises `BrokerUnavailable`; the thread does not run then."""
    try:
        thread.start()
    except RuntimeError as error:
        raise _lack("start no thread", _THREADS) from error


def open_bell() -> int:
    """A descriptor that wakes a thread. Raises `BrokerUnavailable`."""
    try:
        return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    except OSError as error:
        raise _lack("open no file", _DESCRIPTORS) from error


@contextmanager
def importing() -> Iterator[None]:
    """For imports on use, which a lack of descriptors or memory can prevent. Raises `BrokerUnavailable`."""
    try:
        yield
    except (ImportError, MemoryError, OSError) as error:
        what = "not import what it needs to reach a broker"
        raise _lack(f"{what} ({error})", f"install it, {_DESCRIPTORS}, or {_ADDRESS_SPACE}") from error


def require_for_channel() -> None:
    """gRPC ends the whole process if it lacks a thread, a descriptor or memory when it starts: take as many of each,
    and give them back. Raises `BrokerUnavailable`."""
    with ExitStack() as held:
        _hold_descriptors(held)
        _hold_address_space(held)
        _hold_threads(held)


def _hold_descriptors(held: ExitStack) -> None:
    try:
        for _ in range(_DESCRIPTOR_COUNT):
            held.callback(os.close, os.eventfd(0, os.EFD_CLOEXEC))
    except OSError as error:
        raise _lack(f"open fewer than {_DESCRIPTOR_COUNT} files more, which gRPC needs", _DESCRIPTORS) from error


def _hold_address_space(held: ExitStack) -> None:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    try:
        held.enter_context(mmap.mmap(-1, _ADDRESS_SPACE_BYTES, flags=flags, prot=mmap.PROT_READ))
    except (OSError, MemoryError) as error:
        raise _lack(f"map fewer than {_ADDRESS_SPACE_BYTES} bytes, which gRPC needs", _ADDRESS_SPACE) from error


def _hold_threads(held: ExitStack) -> None:
    """Not `threading.Thread`: these do nothing, and none of them may be seen by the application."""
    least, most = _THREAD_BOUNDS
    count = min(max(os.sysconf("SC_NPROCESSORS_CONF"), least), most) + _MORE_THREADS
    held.callback(_wait_for_at_most, _thread_count())
    gate = _thread.allocate_lock()
    gate.acquire()
    held.callback(gate.release)
    try:
        for _ in range(count):
            _thread.start_new_thread(partial(_pass, gate), ())
    except RuntimeError as error:
        raise _lack(f"start fewer than {count} threads more, which gRPC needs", _THREADS) from error


def _pass(gate: _thread.LockType) -> None:
    with gate:
        pass


def _wait_for_at_most(count: int) -> None:
    """Until the threads of this process are that many: an ending thread still counts against the limits."""
    deadline = time.monotonic() + _THREAD_END_SECONDS
    while _thread_count() > count and time.monotonic() < deadline:
        time.sleep(0.0002)


def _thread_count() -> int:
    with contextlib.suppress(OSError):
        return len(os.listdir("/proc/self/task"))
    return 0


def _lack(what: str, advice: str) -> BrokerUnavailable:
    return BrokerUnavailable(f"this process can {what}: {advice}")
