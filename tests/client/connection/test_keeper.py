"""The keeper sleeps until a session ends, restores what is kept, and is gone when nothing is."""

from __future__ import annotations

import gc
import os
import resource
import select
import socket
import threading
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import NoReturn

import pytest

from support.waiting import eventually
from weight_broker.connection import keeper as keeper_module
from weight_broker.connection.keeper import Keeper, _restore
from weight_broker.errors import BrokerUnavailable


class Lamp:
    """Something kept: restored by connecting a new pair of sockets; fails as often as told."""

    def __init__(self, route: object = None) -> None:
        self.route = route or self
        self.failures = 0
        self.attempts = 0
        self.restored = 0
        self.near, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def restore(self) -> None:
        if self.far.fileno() >= 0:
            return
        self.attempts += 1
        if self.failures:
            self.failures -= 1
            raise BrokerUnavailable("not yet")
        self.near.close()
        self.near, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.restored += 1

    def fileno(self) -> int:
        return self.near.fileno()


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    created = Keeper()
    yield created
    created.stop()


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[set[int], float | None]]:
    """How the keeper sleeps: the sockets whose end wakes it, and for how many seconds at most, which do not pass."""
    slept: list[tuple[set[int], float | None]] = []
    sleep = keeper_module._sleep

    def note_and_sleep(bell: int, sockets: Iterable[int], seconds: float | None) -> None:
        watched = set(sockets)
        slept.append((watched, seconds))
        if seconds is None:
            sleep(bell, watched, None)

    monkeypatch.setattr(keeper_module, "_sleep", note_and_sleep)
    return slept


def no_thread(*arguments: object) -> NoReturn:
    """As the interpreter says it at a limit of threads."""
    raise RuntimeError("can't start new thread")


def keeper_threads() -> int:
    return sum(thread.name == "weight-broker-keeper" for thread in threading.enumerate())


def test_the_thread_lives_only_while_something_is_kept(
    keeper: Keeper, sleeps: list[tuple[set[int], float | None]]
) -> None:
    assert keeper_threads() == 0
    one, other = Lamp(), Lamp()
    keeper.add(one)
    keeper.add(other)
    assert keeper_threads() == 1
    keeper.remove(one)
    eventually(lambda: sleeps and sleeps[-1] == ({other.fileno()}, None))
    assert keeper_threads() == 1
    keeper.remove(other)
    eventually(lambda: keeper_threads() == 0)
    keeper.add(one)
    assert keeper_threads() == 1


def test_it_sleeps_until_a_session_ends_and_never_just_for_a_while(
    keeper: Keeper, sleeps: list[tuple[set[int], float | None]]
) -> None:
    lamp = Lamp()
    keeper.add(lamp)
    eventually(lambda: len(sleeps) == 1)
    lamp.far.close()
    eventually(lambda: len(sleeps) == 2)
    assert (lamp.attempts, lamp.restored) == (1, 1)
    assert [seconds for _, seconds in sleeps] == [None, None]


def test_it_tries_again_until_it_succeeds_and_slower_each_time(
    keeper: Keeper, sleeps: list[tuple[set[int], float | None]]
) -> None:
    lamp = Lamp()
    lamp.failures = 7
    lamp.far.close()
    keeper.add(lamp)
    eventually(lambda: lamp.restored == 1)
    assert lamp.attempts == 8
    pauses = [seconds for _, seconds in sleeps if seconds is not None]
    assert pauses == pytest.approx([0.2, 0.3, 0.45, 0.675, 1.0, 1.0, 1.0])


def test_while_something_is_broken_an_ended_socket_does_not_cut_a_sleep_short(monkeypatch: pytest.MonkeyPatch) -> None:
    lamp = Lamp()
    lamp.far.close()
    polls: list[tuple[list[int], float | None]] = []

    class Poller:
        def __init__(self) -> None:
            self.registered: list[int] = []

        def register(self, descriptor: int, events: int) -> None:
            self.registered.append(descriptor)

        def poll(self, milliseconds: float | None) -> None:
            polls.append((self.registered, milliseconds))

    bell = os.eventfd(0, os.EFD_NONBLOCK)
    monkeypatch.setattr(
        keeper_module, "select", SimpleNamespace(poll=Poller, POLLIN=select.POLLIN, POLLRDHUP=select.POLLRDHUP)
    )
    keeper_module._sleep(bell, [lamp.fileno()], 0.2)
    keeper_module._sleep(bell, [lamp.fileno()], None)
    os.close(bell)
    assert polls == [([bell], 200.0), ([bell, lamp.fileno()], None)]


def test_where_one_finds_no_broker_the_others_do_not_try() -> None:
    route = object()
    first, second, elsewhere = Lamp(route), Lamp(route), Lamp()
    for lamp in (first, second, elsewhere):
        lamp.failures = 1
        lamp.far.close()
    assert _restore([first, second, elsewhere], set())
    assert [lamp.attempts for lamp in (first, second, elsewhere)] == [1, 0, 1]


class Broken(Lamp):
    """What a channel that another thread has closed raises is no `BrokerError`."""

    def restore(self) -> None:
        raise ValueError("test")


def test_a_defect_in_one_does_not_keep_the_others_from_being_restored() -> None:
    other = Lamp()
    other.far.close()
    assert _restore([Broken(), other], set())
    assert other.restored == 1


def test_a_forked_child_has_no_keeper_and_can_have_its_own(keeper: Keeper) -> None:
    keeper.add(Lamp())
    child = os.fork()
    if child == 0:
        try:
            keeper.forget_after_fork()
            mine = Lamp()
            keeper.add(mine)
            mine.far.close()
            eventually(lambda: mine.restored == 1)
        except BaseException:  # noqa: BLE001 - the parent sees the status
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_a_thread_that_could_not_start_is_not_believed_to_run(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    lamp = Lamp()
    gc.collect()  # what other tests left must not be closed meanwhile
    descriptors = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patched:
        patched.setattr(threading, "_start_new_thread", no_thread)
        with pytest.raises(BrokerUnavailable, match="can start no thread"):
            keeper.add(lamp)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    keeper.add(lamp)
    lamp.far.close()
    eventually(lambda: lamp.restored == 1)


def test_without_a_descriptor_nothing_is_kept(keeper: Keeper) -> None:
    lamp = Lamp()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(BrokerUnavailable, match="LimitNOFILE"):
            keeper.add(lamp)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert keeper_threads() == 0
    keeper.add(lamp)
    assert keeper_threads() == 1


def test_a_reason_is_a_warning_once_and_then_a_detail(keeper: Keeper, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="weight_broker")
    lamp = Lamp()
    lamp.failures = 3
    keeper.add(lamp)
    lamp.far.close()
    eventually(lambda: lamp.restored == 1)
    levels = [record.levelname for record in caplog.records if "cannot be published now" in record.message]
    assert levels == ["WARNING", "DEBUG", "DEBUG"]
