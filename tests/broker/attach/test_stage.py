"""The stage connection, both ends of it, on real sockets: who may serve, what is asked, and how it ends."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from support.attach_room import AttachRoom
from support.waiting import eventually
from weight_broker.connection.stage_server import StagingServer
from weight_broker.errors import BrokerUnavailable, NotAttached
from weight_broker.v1 import attach_pb2 as pb
from weight_broker.v1 import weight_set_pb2
from weight_brokerd.attach.stage import StagingConnections, StagingGone, StagingRefused, StagingSilent

OPEN = pb.StageRequest(open_bucket=pb.OpenBucket(bucket=weight_set_pb2.Region(region_id="b"), stage_id="s"))
COPY = pb.StageRequest(
    copy_chunk=pb.CopyChunk(bucket_id="b", stage_id="s", direction=pb.CopyChunk.DIRECTION_TO_BUCKET, size_bytes=5)
)
CLOSE = pb.StageRequest(close_bucket=pb.CloseBucket(bucket_id="b"))


class Tensors:
    """Writes down what is done with them."""

    def __init__(self) -> None:
        self.done: list[tuple[Any, ...]] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.is_copying = False

    def open(self, bucket: weight_set_pb2.Region) -> None:
        self.done.append(("open", bucket.region_id))

    def close(self, bucket_id: str) -> None:
        self.done.append(("close", bucket_id))

    def copy(self, bucket_id: str, bucket_offset: int, content_offset: int, size: int, *, to_bucket: bool) -> None:
        self.is_copying = True
        assert self.may_go_on.wait(60)
        self.is_copying = False
        if size == 13:
            raise ValueError("thirteen bytes")
        self.done.append(("copy", bucket_id, size, to_bucket))


class Broker(AttachRoom):
    """An attach server that keeps stage connections."""

    def __init__(self, path: Path) -> None:
        self.staging: StagingConnections | None = None
        self.lost: list[tuple[str, str]] = []
        super().__init__(path)

        def connect(instance_id: str, connection: Any) -> None:
            if self.staging is None:
                self.staging = StagingConnections(lambda instance_id, why: self.lost.append((instance_id, why)))
            self.staging.connected(instance_id, connection)

        self.attendance.stage_connected = connect  # type: ignore[method-assign]

    def ask(self, request: pb.StageRequest, timeout: float = 10.0) -> Future[None]:
        """Asks the instance."""
        assert self.staging is not None
        copy = pb.StageRequest()
        copy.CopyFrom(request)
        return asyncio.run_coroutine_threadsafe(self.staging.ask("instance-1", copy, timeout), self.loop)

    def let_go(self) -> Future[bool]:
        """Ends when the instance has unmapped what it was lent."""
        assert self.staging is not None
        return asyncio.run_coroutine_threadsafe(self.staging.let_go("instance-1"), self.loop)

    def drop(self) -> None:
        """The broker asks nothing more on the connection."""
        assert self.staging is not None
        self.loop.call_soon_threadsafe(self.staging.drop, "instance-1")
        eventually(lambda: not self.has())

    def has(self) -> bool:
        """Whether the instance can be asked."""
        return self.staging is not None and self.staging.has("instance-1")

    def close(self) -> None:
        if self.staging is not None:
            self.loop.call_soon_threadsafe(self.staging.close)
        super().close()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(tmp_path / "attach.sock")
    yield broker
    broker.close()


@pytest.fixture
def server(broker: Broker) -> Iterator[StagingServer]:
    server = StagingServer(broker.path, b"token")
    yield server
    server.close()


def test_chunks_are_copied_when_the_broker_asks_and_the_thread_ends_with_the_last(
    broker: Broker, server: StagingServer
) -> None:
    tensors = Tensors()
    server.add("s", tensors)
    eventually(broker.has)
    for request in (OPEN, COPY, CLOSE, CLOSE):
        broker.ask(request).result(60)
    assert tensors.done == [("open", "b"), ("copy", "b", 5, True), ("close", "b")]
    assert server.serves("s")
    server.remove("s")
    eventually(lambda: not broker.has())
    assert not server.serves("s")
    eventually(lambda: "weight-broker-stage" not in {thread.name for thread in threading.enumerate()})
    server.add("s", tensors)
    eventually(broker.has)
    broker.ask(OPEN).result(60)


def test_what_fails_is_answered_and_the_next_request_is_served(broker: Broker, server: StagingServer) -> None:
    tensors = Tensors()
    server.add("s", tensors)
    eventually(broker.has)
    unlucky = pb.StageRequest(copy_chunk=pb.CopyChunk(bucket_id="b", stage_id="s", size_bytes=13))
    with pytest.raises(StagingRefused, match="thirteen bytes"):
        broker.ask(unlucky).result(60)
    stranger = pb.StageRequest(copy_chunk=pb.CopyChunk(bucket_id="b", stage_id="other"))
    with pytest.raises(StagingRefused, match="nothing is staged as 'other'"):
        broker.ask(stranger).result(60)
    broker.ask(OPEN).result(60)


def test_removing_waits_for_the_copy_that_runs_and_nothing_is_copied_after_it(
    broker: Broker, server: StagingServer
) -> None:
    tensors, other = Tensors(), Tensors()
    server.add("s", tensors)
    server.add("t", other)
    eventually(broker.has)
    tensors.may_go_on.clear()
    first, second = broker.ask(COPY), broker.ask(COPY)
    eventually(lambda: tensors.is_copying)
    removing = threading.Thread(target=server.remove, args=("s",))
    removing.start()
    removing.join(0.2)
    assert removing.is_alive()
    tensors.may_go_on.set()
    removing.join(60)
    first.result(60)
    with pytest.raises(StagingRefused, match="nothing is staged"):
        second.result(60)
    assert tensors.done == [("copy", "b", 5, True)]


def test_who_does_not_answer_loses_the_connection_and_unmaps_its_buckets(broker: Broker, server: StagingServer) -> None:
    tensors = Tensors()
    server.add("s", tensors)
    eventually(broker.has)
    broker.ask(OPEN).result(60)
    tensors.may_go_on.clear()
    with pytest.raises(StagingSilent):
        broker.ask(COPY, timeout=0.2).result(60)
    assert broker.lost == [("instance-1", "it did not answer within 0.2 s")]
    with pytest.raises(StagingGone, match="no stage connection"):
        broker.ask(COPY).result(60)
    letting_go = broker.let_go()
    assert ("close", "b") not in tensors.done
    assert not letting_go.done()
    tensors.may_go_on.set()
    letting_go.result(60)
    assert ("close", "b") in tensors.done
    eventually(lambda: not server.serves("s"))


@pytest.mark.parametrize("is_asked_before", [True, False])
def test_a_broker_that_ends_does_not_say_that_an_instance_that_copies_has_let_go(
    broker: Broker, server: StagingServer, is_asked_before: bool
) -> None:
    tensors = Tensors()
    server.add("s", tensors)
    eventually(broker.has)
    broker.ask(OPEN).result(60)
    tensors.may_go_on.clear()
    with pytest.raises(StagingSilent):
        broker.ask(COPY, timeout=0.2).result(60)
    letting_go = broker.let_go() if is_asked_before else None
    assert broker.staging is not None
    broker.loop.call_soon_threadsafe(broker.staging.close)
    assert not (letting_go or broker.let_go()).result(60)
    tensors.may_go_on.set()


def test_the_end_of_the_connection_is_heard_by_whoever_waits(broker: Broker, server: StagingServer) -> None:
    tensors = Tensors()
    server.add("s", tensors)
    eventually(broker.has)
    tensors.may_go_on.clear()
    waiting = broker.ask(COPY)
    eventually(lambda: tensors.is_copying)
    closing = threading.Thread(target=server.close)
    closing.start()
    tensors.may_go_on.set()
    closing.join(60)
    waiting.result(60)  # it was done before the connection ended
    eventually(lambda: not broker.has())


def test_a_forked_child_serves_nothing_and_takes_nothing_from_its_parent(broker: Broker, server: StagingServer) -> None:
    tensors = Tensors()
    server.add("s", tensors)
    eventually(broker.has)
    child = os.fork()
    if not child:
        os._exit(1 if server.serves("s") else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    broker.ask(OPEN).result(60)
    assert server.serves("s")


def test_who_has_lost_the_connection_serves_on_another_one_once_the_last_copy_has_ended(
    broker: Broker, server: StagingServer
) -> None:
    """Also if the thread, which copies, has not seen the loss."""
    tensors = Tensors()
    server.add("s", tensors)
    eventually(broker.has)
    broker.ask(OPEN).result(60)
    tensors.may_go_on.clear()
    copying = broker.ask(COPY)
    eventually(lambda: tensors.is_copying)
    broker.drop()
    with pytest.raises(StagingGone):
        copying.result(60)
    with pytest.raises(BrokerUnavailable, match="has ended, and what was copied on it has not"):
        server.add("t", tensors, timeout=0.1)
    tensors.may_go_on.set()
    server.add("t", tensors)
    assert tensors.done == [("open", "b"), ("copy", "b", 5, True), ("close", "b")]
    eventually(broker.has)
    broker.ask(OPEN).result(60)
    assert server.serves("t")


def test_what_the_broker_had_learned_on_a_connection_that_ended_is_not_served_on_the_next_one(
    broker: Broker, server: StagingServer
) -> None:
    """The broker has ended what was published: it must be published again, although there is a connection."""
    server.add("s", Tensors())
    eventually(broker.has)
    broker.drop()
    server.add("t", Tensors())
    assert (server.serves("s"), server.serves("t")) == (False, True)
    server.add("s", Tensors())
    assert server.serves("s")


def test_whoever_is_not_attached_may_not_serve(broker: Broker, server: StagingServer) -> None:
    broker.attendance.refuse(NotAttached("no such token"))
    with pytest.raises(NotAttached, match="no such token"):
        server.add("s", Tensors())
    assert not server.serves("s")


def test_an_attach_connection_does_not_become_a_stage_connection(broker: Broker) -> None:
    with broker.instance() as client:
        answer = client.ask(pb.AttachRequest(serve_stage=pb.ServeStage(session_token=b"token")))
        assert "second connection" in answer.refused.message
