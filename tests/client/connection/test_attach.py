"""The attach connection keeps questions and answers together, whatever goes wrong between them."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import NoReturn

import pytest

from support.scripted_broker import TOKEN, ScriptedBroker, refused
from support.scripted_stage import assert_set
from support.waiting import eventually
from weight_broker.connection import attach, session
from weight_broker.connection.attach import AttachConnection
from weight_broker.connection.session import Attachment
from weight_broker.errors import BrokerError, BrokerUnavailable, NotAttached, PublishRefused, Reason
from weight_broker.v1 import attach_pb2


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[ScriptedBroker]:
    scripted = ScriptedBroker(tmp_path).start()
    yield scripted
    scripted.stop()


@pytest.fixture
def connection(broker: ScriptedBroker) -> Iterator[AttachConnection]:
    connected = AttachConnection(broker.directory / "attach.sock", "name")
    assert connected.connect().session_token == TOKEN
    yield connected
    connected.close()


def test_a_refusal_becomes_the_exception_of_its_reason(broker: ScriptedBroker, connection: AttachConnection) -> None:
    broker.on_attach = lambda request: refused(Reason.REGION_REFUSED, "not sealed")
    with pytest.raises(PublishRefused, match="not sealed") as caught:
        connection.offer_region("region", 0, 1)
    assert caught.value.reason is Reason.REGION_REFUSED


def test_a_reason_of_a_newer_broker_becomes_a_plain_error(broker: ScriptedBroker, connection: AttachConnection) -> None:
    broker.on_attach = lambda request: refused("NEW_REASON", "what is new")
    with pytest.raises(BrokerError, match="NEW_REASON: what is new"):
        connection.withdraw_region("region")


def test_a_claimed_descriptor_is_the_callers_and_is_not_inherited(
    broker: ScriptedBroker, connection: AttachConnection
) -> None:
    descriptor = os.memfd_create("region")
    os.write(descriptor, b"content")
    broker.regions["transfer", 1] = descriptor
    claimed = connection.claim_region("transfer", 1)
    assert os.pread(claimed, 7, 0) == b"content"
    assert not os.get_inheritable(claimed)
    os.close(claimed)
    os.close(descriptor)


def test_a_process_without_a_descriptor_for_the_memory_says_so_and_stays_attached(
    broker: ScriptedBroker, connection: AttachConnection
) -> None:
    region = os.memfd_create("region")
    broker.regions["transfer", 0] = region
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(BrokerUnavailable, match="LimitNOFILE"):
            connection.claim_region("transfer", 0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not connection.is_over()
    os.close(connection.claim_region("transfer", 0))
    os.close(region)


def test_a_broker_that_hangs_is_left_with_a_goodbye(
    broker: ScriptedBroker, connection: AttachConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up = threading.Event()
    broker.on_attach = lambda request: assert_set(given_up)
    monkeypatch.setattr(attach, "REQUEST_TIMEOUT_SECONDS", 0.05)
    with pytest.raises(BrokerUnavailable, match="within"):
        connection.withdraw_region("region")
    given_up.set()
    assert connection.is_over()
    with pytest.raises(NotAttached):
        connection.withdraw_region("region")
    requests = [broker.attach_requests.get(timeout=60) for _ in range(3)]
    assert requests == ["hello", "withdraw_region", "goodbye"]  # what it does late, it undoes


def test_a_caller_without_time_leaves_its_request_behind_and_the_session_in_place(
    broker: ScriptedBroker, connection: AttachConnection
) -> None:
    given_up = threading.Event()
    broker.on_attach = lambda request: assert_set(given_up)
    with pytest.raises(BrokerUnavailable, match="within"):
        connection.claim_region("transfer", 0, timeout=0.05)
    given_up.set()
    assert not connection.is_over()
    broker.on_attach = lambda request: refused(Reason.REGION_REFUSED, "the second answer")
    with pytest.raises(PublishRefused, match="the second answer"):
        connection.withdraw_region("region")


def test_a_thread_without_time_does_not_wait_for_the_answer_to_another(
    broker: ScriptedBroker, connection: AttachConnection
) -> None:
    asked, answered = threading.Event(), threading.Event()

    def late(request: attach_pb2.AttachRequest) -> None:
        asked.set()
        assert_set(answered)

    broker.on_attach = late
    patient = threading.Thread(target=connection.withdraw_region, args=("region",))
    patient.start()
    assert_set(asked)
    with pytest.raises(BrokerUnavailable, match="within"):
        connection.claim_region("transfer", 0, timeout=0.05)
    answered.set()
    patient.join(60)
    assert not connection.is_over()


def test_a_connection_that_an_ending_broker_drops_is_made_again(broker: ScriptedBroker) -> None:
    """A broker that ends accepts no more, but the kernel did so for it."""
    dropped: list[None] = []

    def drop_the_first(request: attach_pb2.AttachRequest) -> None:
        if not dropped:
            dropped.append(None)
            broker.drop_attachments()

    broker.on_attach = drop_the_first
    connection = AttachConnection(broker.directory / "attach.sock", "name")
    assert connection.connect(60).session_token == TOKEN
    connection.close()


def test_a_broker_that_refuses_to_attach_this_process_is_asked_once(broker: ScriptedBroker) -> None:
    broker.on_attach = lambda request: refused(Reason.NOT_ATTACHED, "this process cannot be watched")
    with pytest.raises(NotAttached, match="cannot be watched"):
        AttachConnection(broker.directory / "attach.sock", "name").connect(60)
    assert [broker.attach_requests.get(timeout=60) for _ in range(2)] == ["hello", "goodbye"]


def test_a_broker_that_drops_every_connection_is_unavailable(broker: ScriptedBroker) -> None:
    broker.on_attach = lambda request: broker.drop_attachments()
    with pytest.raises(BrokerUnavailable, match="ending"):
        Attachment(broker.directory, "name", 60).run(lambda session: session)


def test_the_answer_to_an_interrupted_request_is_not_taken_for_the_next_one(
    broker: ScriptedBroker, connection: AttachConnection
) -> None:
    caller = threading.get_ident()
    interrupted = threading.Event()

    def late(request: attach_pb2.AttachRequest) -> None:
        if request.WhichOneof("request") == "claim_region":
            eventually(lambda: connection._owed == 1 and not connection._unsure)  # it waits for the answer
            signal.pthread_kill(caller, signal.SIGUSR1)
            assert_set(interrupted)

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    region = os.memfd_create("region")
    broker.regions["transfer", 0] = region
    broker.on_attach = late
    open_before = len(os.listdir("/proc/self/fd"))
    handler = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            connection.claim_region("transfer", 0)
    finally:
        interrupted.set()
        signal.signal(signal.SIGUSR1, handler)
    broker.on_attach = lambda request: refused(Reason.REGION_REFUSED, "the second answer")
    with pytest.raises(PublishRefused, match="the second answer"):
        connection.withdraw_region("region")
    assert len(os.listdir("/proc/self/fd")) == open_before  # the late answer's descriptor is closed
    os.close(region)


def test_an_interruption_that_leaves_questions_and_answers_in_doubt_ends_the_connection(
    broker: ScriptedBroker, connection: AttachConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(connected: socket.socket) -> tuple[bytes, list[int]]:
        connected.recv(1 << 16)
        raise KeyboardInterrupt

    monkeypatch.setattr(attach, "_receive_packet", interrupted)
    with pytest.raises(KeyboardInterrupt):
        connection.withdraw_region("region")
    monkeypatch.undo()
    assert connection.is_over()
    with pytest.raises(NotAttached):
        connection.withdraw_region("region")


def test_a_connection_that_the_broker_closed_is_over(broker: ScriptedBroker, connection: AttachConnection) -> None:
    assert not connection.is_over()
    broker.drop_attachments()
    assert connection.is_over()
    with pytest.raises(NotAttached):
        connection.withdraw_region("region")


def test_a_forked_child_lets_go_without_a_word(broker: ScriptedBroker, connection: AttachConnection) -> None:
    child = os.fork()
    if child == 0:
        connection.forget()
        os._exit(0 if connection.is_over() else 1)
    assert os.waitpid(child, 0)[1] == 0
    connection.withdraw_region("region")
    requests = [broker.attach_requests.get(timeout=60) for _ in range(2)]
    assert requests == ["hello", "withdraw_region"]


def test_leaving_says_goodbye(broker: ScriptedBroker, connection: AttachConnection) -> None:
    connection.leave()
    assert [broker.attach_requests.get(timeout=60) for _ in range(3)] == ["hello", "goodbye", "end"]
    connection.leave()
    with pytest.raises(NotAttached):
        connection.goodbye()


def test_a_broker_that_hangs_costs_many_threads_the_time_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has asked before it is found out is told what the first one finds, and does not try as well."""
    count = 8
    asked = threading.Semaphore(0)
    tries: list[Path] = []

    def note_and_tell_the_time() -> float:
        asked.release()
        return time.monotonic()

    def try_until_all_have_asked(directory: Path, name: str, connect_timeout: float) -> NoReturn:
        tries.append(directory)
        for _ in range(count):
            assert asked.acquire(timeout=60)
        raise BrokerUnavailable("it does not answer")

    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=note_and_tell_the_time))
    monkeypatch.setattr(session, "Session", try_until_all_have_asked)
    attachment = Attachment(tmp_path, "name", 600)
    failed: list[str] = []

    def ask() -> None:
        with pytest.raises(BrokerUnavailable, match="does not answer") as caught:
            attachment.session()
        failed.append(caught.value.message)

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(failed) == count
    assert tries == [tmp_path]


def test_without_a_free_descriptor_there_is_no_broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*arguments: object) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(socket, "socket", exhausted)
    with pytest.raises(BrokerUnavailable, match="Too many open files"):
        AttachConnection(tmp_path / "attach.sock").connect()
