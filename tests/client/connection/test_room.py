"""What gRPC needs is there before it starts, and nothing of the look for it stays."""

from __future__ import annotations

import _thread
import gc
import os
import resource
import threading
from typing import Any, NoReturn

import pytest

from support.waiting import eventually
from weight_broker.connection import room
from weight_broker.errors import BrokerUnavailable


def held() -> tuple[int, int]:
    """Descriptors and threads of this process, without garbage that earlier tests left."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def test_where_there_is_room_nothing_of_it_stays_in_use() -> None:
    before = held()
    room.require_for_channel()
    eventually(lambda: held() == before)  # the kernel counts a thread for a moment after its end


def test_a_limit_of_open_files_is_named_and_nothing_stays_open() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = held()
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 3, limits[1]))
    try:
        with pytest.raises(BrokerUnavailable, match="LimitNOFILE"):
            room.require_for_channel()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert held() == before


def test_threads_that_were_started_end_if_there_are_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    before = held()
    start = _thread.start_new_thread
    started: list[int] = []

    def start_five(*arguments: Any) -> int:
        if len(started) == 5:
            raise RuntimeError("can't start new thread")
        started.append(start(*arguments))
        return started[-1]

    monkeypatch.setattr(_thread, "start_new_thread", start_five)
    with pytest.raises(BrokerUnavailable, match=r"pids\.max"):
        room.require_for_channel()
    assert len(started) == 5
    assert held() == before


@pytest.mark.parametrize(
    "error", [OSError(24, "Too many open files"), MemoryError(), ImportError("cannot allocate memory in static TLS")]
)
def test_an_import_that_a_shortage_prevents_is_an_error_of_this_package(error: Exception) -> None:
    with pytest.raises(BrokerUnavailable, match="not import what it needs") as caught, room.importing():
        raise error
    assert caught.value.__cause__ is error


def test_a_thread_that_cannot_start_is_an_error_of_this_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(*arguments: object) -> NoReturn:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading, "_start_new_thread", no_thread)
    with pytest.raises(BrokerUnavailable, match="can start no thread"):
        room.start(threading.Thread(target=held))
