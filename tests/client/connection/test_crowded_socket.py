"""A backlog that others fill: a process waits in the kernel for room, and has a gRPC socket that no other can fill."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.scripted_broker import TOKEN, ScriptedBroker
from support.waiting import eventually
from weight_broker.connection.attach import AttachConnection, connect_to
from weight_broker.connection.session import Session
from weight_broker.errors import BrokerUnavailable
from weight_broker.v1 import attach_pb2
from weight_broker.v1 import weight_broker_service_pb2 as pb


class Crowd:
    """A listening socket without room in its backlog; nobody accepts until a test says so."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(path))
        self.listener.listen(0)
        self._crowd: list[socket.socket] = []
        with contextlib.suppress(BlockingIOError):
            while True:
                self._crowd.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK))
                self._crowd[-1].connect(str(path))

    def make_room(self) -> None:
        self._crowd.append(self.listener.accept()[0])

    def close(self) -> None:
        for connection in [self.listener, *self._crowd]:
            connection.close()


@pytest.fixture
def crowd(tmp_path: Path) -> Iterator[Crowd]:
    crowded = Crowd(tmp_path / "attach.sock")
    yield crowded
    crowded.close()


def waits_for_room(thread: int) -> bool:
    """Whether a thread of this process sleeps in the kernel; its state is that of the moment."""
    fields = Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(")")[2].split()
    return fields[0] == "S"


def test_a_process_that_finds_no_room_waits_for_it(crowd: Crowd) -> None:
    connected: list[socket.socket] = []
    waiting = threading.Thread(target=lambda: connected.append(connect_to(crowd.path, 60)))
    waiting.start()
    eventually(lambda: waits_for_room(waiting.native_id or 0))
    assert not connected
    crowd.make_room()
    waiting.join(60)
    assert connected[0].getpeername() == str(crowd.path)
    connected[0].close()


def test_a_process_that_finds_no_room_before_its_deadline_is_not_served(crowd: Crowd) -> None:
    with pytest.raises(BrokerUnavailable, match="no broker answers"):
        connect_to(crowd.path, 0.01)


def test_a_signal_during_the_wait_for_room_is_not_taken_for_a_connection(crowd: Crowd) -> None:
    """Python does so: it waits until the socket can be written to, which holds for a socket that is not connected."""
    signals: list[int] = []
    main = threading.get_native_id()

    def disturb() -> None:
        for number in range(3):
            eventually(lambda: waits_for_room(main))
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            eventually(lambda number=number: len(signals) > number)  # type: ignore[misc]
        crowd.make_room()

    before = signal.signal(signal.SIGUSR1, lambda number, _: signals.append(number))
    disturbing = threading.Thread(target=disturb)
    try:
        disturbing.start()
        connected = connect_to(crowd.path, 60)
    finally:
        disturbing.join(60)
        signal.signal(signal.SIGUSR1, before)
    with connected:
        assert connected.getpeername() == str(crowd.path)
    assert len(signals) == 3


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[ScriptedBroker]:
    scripted = ScriptedBroker(tmp_path).start()
    yield scripted
    scripted.stop()


def test_calls_go_over_the_socket_that_came_with_welcome(broker: ScriptedBroker) -> None:
    broker.entrance = os.open(broker.directory / "broker.sock", os.O_PATH)
    (broker.directory / "broker.sock").unlink()
    session = Session(broker.directory, "name", 60)
    os.close(broker.entrance)
    assert session.stub.Retract(pb.RetractRequest(publication_id="one"), timeout=60, metadata=session.metadata)
    assert broker.retractions.get(timeout=60) == "one"
    session.end()


def test_a_broker_that_has_no_such_socket_is_called_over_the_one_for_all(broker: ScriptedBroker) -> None:
    session = Session(broker.directory, "name", 60)
    assert session.connection.grpc_socket == broker.directory / "broker.sock"
    assert session.stub.Retract(pb.RetractRequest(publication_id="one"), timeout=60, metadata=session.metadata)
    session.end()


def test_the_way_to_the_socket_is_closed_with_the_connection_that_it_came_with(broker: ScriptedBroker) -> None:
    broker.entrance = os.open(broker.directory / "broker.sock", os.O_PATH)
    connection = AttachConnection(broker.directory / "attach.sock", "name")
    assert connection.connect(60).session_token == TOKEN
    way = connection.grpc_socket
    assert way.is_socket()
    assert not os.get_inheritable(int(way.name))
    connection.close()
    del connection
    assert not way.exists()
    os.close(broker.entrance)


def test_a_process_asks_for_a_socket_when_it_attaches(broker: ScriptedBroker) -> None:
    asked: list[bool] = []

    def remember(request: attach_pb2.AttachRequest) -> None:
        if request.HasField("hello"):
            asked.append(request.hello.entrance)

    broker.on_attach = remember
    Session(broker.directory, "name", 60).end()
    assert asked == [True]
