"""The keeper sleeps until a session ends, restores what is kept, and is gone when nothing is."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from weight_broker.connection.keeper import Keeper, _restore
from weight_broker.errors import BrokerUnavailable


class Lamp:
    """Something kept: restored by connecting a new pair of sockets; fails as often as told."""

    def __init__(self, route: object = None) -> None:
        self.route = route or self
        self.failures = 0
        self.attempts: list[float] = []
        self.restored = 0
        self.near, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def restore(self) -> None:
        if self.far.fileno() >= 0:
            return
        self.attempts.append(time.monotonic())
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


def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def keeper_threads() -> int:
    return sum(thread.name == "weight-broker-keeper" for thread in threading.enumerate())


def test_the_thread_lives_only_while_something_is_kept(keeper: Keeper) -> None:
    assert keeper_threads() == 0
    one, other = Lamp(), Lamp()
    keeper.add(one)
    keeper.add(other)
    assert keeper_threads() == 1
    keeper.remove(one)
    time.sleep(0.05)
    assert keeper_threads() == 1
    keeper.remove(other)
    until(lambda: keeper_threads() == 0)
    keeper.add(one)
    assert keeper_threads() == 1


def test_the_end_of_a_session_is_noticed_at_once(keeper: Keeper) -> None:
    lamp = Lamp()
    keeper.add(lamp)
    time.sleep(0.05)
    ended = time.monotonic()
    lamp.far.close()
    until(lambda: lamp.restored == 1)
    assert lamp.attempts[0] - ended < 0.1


def test_it_tries_again_until_it_succeeds_and_slower_each_time(keeper: Keeper) -> None:
    lamp = Lamp()
    lamp.failures = 3
    keeper.add(lamp)
    lamp.far.close()
    until(lambda: lamp.restored == 1)
    pauses = [later - earlier for earlier, later in zip(lamp.attempts, lamp.attempts[1:], strict=False)]
    assert pauses == pytest.approx([0.2, 0.3, 0.45], abs=0.1)


def test_where_one_finds_no_broker_the_others_do_not_try() -> None:
    route = object()
    first, second, elsewhere = Lamp(route), Lamp(route), Lamp()
    for lamp in (first, second, elsewhere):
        lamp.failures = 1
        lamp.far.close()
    assert _restore([first, second, elsewhere], set())
    assert [len(lamp.attempts) for lamp in (first, second, elsewhere)] == [1, 0, 1]


class Broken(Lamp):
    """What a channel that another thread has closed raises is no `BrokerError`."""

    def restore(self) -> None:
        raise ValueError("test")


def test_a_defect_in_one_does_not_keep_the_others_from_being_restored() -> None:
    other = Lamp()
    other.far.close()
    assert _restore([Broken(), other], set())
    assert other.restored == 1


def test_idle_it_uses_no_processor_time(keeper: Keeper) -> None:
    keeper.add(Lamp())
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.03


def test_what_is_broken_does_not_make_it_spin(keeper: Keeper) -> None:
    lamp = Lamp()
    lamp.failures = 1000
    keeper.add(lamp)
    lamp.far.close()
    time.sleep(0.6)
    assert len(lamp.attempts) <= 4


def test_a_forked_child_has_no_keeper_and_can_have_its_own(keeper: Keeper) -> None:
    keeper.add(Lamp())
    child = os.fork()
    if child == 0:
        try:
            keeper.forget_after_fork()
            mine = Lamp()
            keeper.add(mine)
            mine.far.close()
            until(lambda: mine.restored == 1)
        except BaseException:  # noqa: BLE001 - the parent sees the status
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_a_reason_is_a_warning_once_and_then_a_detail(keeper: Keeper, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="weight_broker")
    lamp = Lamp()
    lamp.failures = 3
    keeper.add(lamp)
    lamp.far.close()
    until(lambda: lamp.restored == 1)
    levels = [record.levelname for record in caplog.records if "cannot be published now" in record.message]
    assert levels == ["WARNING", "DEBUG", "DEBUG"]
