"""The owner of a staging buffer without its daemon: it ends the stage connections and waits for every borrower."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import NamedTuple

import pytest

from weight_brokerd.cards.child import borrowers as module
from weight_brokerd.cards.child.borrowers import Borrowers


class Connection(NamedTuple):
    """A stage connection: the daemon's end and the instance's."""

    daemon: socket.socket
    instance: socket.socket


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whether the process dies with its daemon, each time that it is said."""
    said: list[str] = []
    monkeypatch.setattr(module, "outlive_parent", lambda: said.append("outlives"))
    monkeypatch.setattr(module, "die_with_parent", lambda: said.append("dies"))
    return said


def connect() -> Connection:
    connection = Connection(*socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    connection.daemon.setblocking(False)
    connection.instance.settimeout(60)
    return connection


def lent(*buffers: str) -> tuple[Borrowers, list[Connection]]:
    """As after the death of the daemon: nothing else has the daemon's ends."""
    borrowers, connections = Borrowers(), [connect() for _ in buffers]
    for name, connection in zip(buffers, connections, strict=True):
        borrowers.lend(name, connection.daemon.detach())
    return borrowers, connections


def let_go(connection: Connection) -> None:
    """What an instance does at the end of its stage connection."""
    assert connection.instance.recv(100) == b""
    connection.instance.send(b"the answer to what it was asked before")
    connection.instance.close()


def waits(borrowers: Borrowers) -> tuple[threading.Thread, Callable[[], None]]:
    waiting = threading.Thread(target=borrowers.wait)
    waiting.start()
    return waiting, lambda: waiting.join(60)


def test_every_borrower_reads_the_end_and_is_waited_for(signals: list[str]) -> None:
    borrowers, (first, second, third) = lent("a", "a", "b")
    waiting, join = waits(borrowers)
    for connection in (third, first):
        let_go(connection)
        assert waiting.is_alive()
    let_go(second)
    join()
    assert not waiting.is_alive()


def test_a_borrower_that_died_is_not_waited_for(signals: list[str]) -> None:
    borrowers, (first, second) = lent("a", "b")
    first.instance.close()
    waiting, join = waits(borrowers)
    let_go(second)
    join()
    assert not waiting.is_alive()


def test_a_process_dies_with_its_daemon_unless_a_buffer_is_lent(signals: list[str]) -> None:
    borrowers, _ = lent("a", "b")
    assert signals == ["outlives", "outlives"]
    borrowers.returned("a")
    assert (set(borrowers.buffers), signals[2:]) == ({"b"}, [])
    borrowers.returned("b")
    assert (set(borrowers.buffers), signals[2:]) == (set(), ["dies"])
