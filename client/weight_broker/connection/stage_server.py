"""Copies between this process's tensors and buckets of the broker's, when the broker asks for it.

One daemon thread for each session; it exists only while something is staged, as a source or to be filled. It sleeps in
poll() on a second connection to the attach socket (no gRPC, no periodic work). It is gone after a fork, and so is what
it serves: the memory is the parent's.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import select
import socket
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from weight_broker.connection.attach import MAX_PACKET_BYTES, REQUEST_TIMEOUT_SECONDS, connect_to, decode_refusal
from weight_broker.connection.keeper import KEEPER
from weight_broker.errors import BrokerUnavailable, NotAttached

if TYPE_CHECKING:
    from weight_broker.v1 import attach_pb2 as pb
    from weight_broker.v1 import weight_set_pb2

_EXIT_SECONDS = 1.0

_logger = logging.getLogger("weight_broker")


class StagedTensors(Protocol):
    """Tensors of this process that are copied chunk by chunk. Called in the thread; what is raised is answered."""

    def open(self, bucket: weight_set_pb2.Region) -> None:
        """Maps a bucket on the tensors' device. Counted: it may be open for other tensors of this process too."""

    def close(self, bucket_id: str) -> None:
        """Undoes one `open`."""

    def copy(self, bucket_id: str, bucket_offset: int, content_offset: int, size: int, *, to_bucket: bool) -> None:
        """Copies a part of the content (see CopyChunk in attach.proto) and waits for it."""


class StagingServer:
    """The stage connection of one session."""

    def __init__(self, path: Path, token: bytes) -> None:
        self._path = path
        self._token = token
        self._lock = threading.Lock()
        self._copied = threading.Condition(self._lock)
        self._staged: dict[str, StagedTensors] = {}
        self._copying = ""
        """Name of the tensors that the thread is at."""
        self._thread: threading.Thread | None = None
        self._socket: socket.socket | None = None
        self._bell = -1
        _servers.add(self)

    def add(self, stage_id: str, tensors: StagedTensors) -> None:
        """From now on the broker may ask for these. Raises `BrokerUnavailable`, `NotAttached`."""
        with self._lock:
            if self._thread is None:
                self._start()
            self._staged[stage_id] = tensors

    def remove(self, stage_id: str) -> None:
        """Returns when the tensors are not copied any more, nor will be. Idempotent."""
        with self._lock:
            self._staged.pop(stage_id, None)
            while self._copying == stage_id:
                self._copied.wait()
            if not self._staged:
                self._ring()

    def serves(self, stage_id: str) -> bool:
        """Whether the broker can ask for these."""
        return self._thread is not None and stage_id in self._staged

    def close(self) -> None:
        """Serves nothing any more, and waits briefly for the thread."""
        with self._lock:
            self._staged.clear()
            thread = self._thread
            self._ring()
        if thread is not None and thread is not threading.current_thread():
            thread.join(_EXIT_SECONDS)

    def forget(self) -> None:
        """For a forked child: there is no thread, and what is staged is the parent's."""
        self._lock = threading.Lock()
        self._copied = threading.Condition(self._lock)
        self._staged, self._copying, self._thread = {}, "", None
        connected, self._socket = self._socket, None
        if connected is not None:
            connected.close()
        bell, self._bell = self._bell, -1
        if bell >= 0:
            os.close(bell)

    def _start(self) -> None:
        connected = _serve_stage(self._path, self._token)
        bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._socket, self._bell = connected, bell
        self._thread = threading.Thread(
            target=self._run, args=(connected, bell), name="weight-broker-stage", daemon=True
        )
        self._thread.start()

    def _ring(self) -> None:
        if self._bell >= 0:
            os.eventfd_write(self._bell, 1)

    def _run(self, connected: socket.socket, bell: int) -> None:
        opened: dict[str, list[StagedTensors]] = {}
        poller = select.poll()
        poller.register(connected, select.POLLIN)
        poller.register(bell, select.POLLIN)
        is_lost = False
        while not is_lost and self._is_needed():
            poller.poll()
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(bell)
            try:
                packet = connected.recv(MAX_PACKET_BYTES)
            except BlockingIOError:
                continue
            except OSError:
                packet = b""
            is_lost = not packet or not _answer(connected, self._do(packet, opened))
        # Buckets first: for the broker the end of the connection says that none is mapped.
        for bucket_id, holders in opened.items():
            for tensors in holders:
                try:
                    tensors.close(bucket_id)
                except Exception:
                    _logger.exception("bucket %s is not unmapped", bucket_id)
        connected.close()
        if is_lost and self._is_missed():
            KEEPER.ring()  # what is published has to be published again

    def _is_needed(self) -> bool:
        """If not, the next `add` starts another thread, and this one ends."""
        with self._lock:
            if not self._staged:
                self._leave()
            return bool(self._staged)

    def _is_missed(self) -> bool:
        """After the connection was lost: whether something is staged still. The next `add` starts another thread."""
        with self._lock:
            self._leave()
            return bool(self._staged)

    def _leave(self) -> None:
        bell, self._bell = self._bell, -1
        os.close(bell)
        self._thread = self._socket = None

    def _do(self, packet: bytes, opened: dict[str, list[StagedTensors]]) -> pb.StageResponse:
        from weight_broker.v1 import attach_pb2 as pb

        request = pb.StageRequest.FromString(packet)
        response = pb.StageResponse(number=request.number)
        try:
            self._act(request, opened)
        except Exception as error:  # noqa: BLE001 - whatever it is, the broker is to hear of it rather than to wait
            _logger.warning("the broker's request for a chunk failed: %s", error)
            response.refused.message = f"{type(error).__name__}: {error}"
        else:
            response.accepted.SetInParent()
        return response

    def _act(self, request: pb.StageRequest, opened: dict[str, list[StagedTensors]]) -> None:
        from weight_broker.v1 import attach_pb2 as pb

        match request.WhichOneof("request"):
            case "open_bucket":
                bucket = request.open_bucket.bucket
                with self._use(request.open_bucket.stage_id) as tensors:
                    tensors.open(bucket)
                    opened.setdefault(bucket.region_id, []).append(tensors)
            case "copy_chunk":
                chunk = request.copy_chunk
                with self._use(chunk.stage_id) as tensors:
                    tensors.copy(
                        chunk.bucket_id,
                        chunk.bucket_offset,
                        chunk.content_offset,
                        chunk.size_bytes,
                        to_bucket=chunk.direction == pb.CopyChunk.DIRECTION_TO_BUCKET,
                    )
            case "close_bucket":
                holders = opened.get(request.close_bucket.bucket_id, [])
                if holders:
                    holders[-1].close(request.close_bucket.bucket_id)
                    holders.pop()
                if not holders:
                    opened.pop(request.close_bucket.bucket_id, None)
            case other:
                raise ValueError(f"this client does not know the request {other}")

    @contextlib.contextmanager
    def _use(self, stage_id: str) -> Iterator[StagedTensors]:
        with self._lock:
            tensors = self._staged.get(stage_id)
            if tensors is None:
                raise ValueError(f"nothing is staged as {stage_id!r} (any more)")
            self._copying = stage_id
        try:
            yield tensors
        finally:
            with self._lock:
                self._copying = ""
                self._copied.notify_all()


def _serve_stage(path: Path, token: bytes) -> socket.socket:
    """A connection that the broker asks on."""
    connected = connect_to(path, REQUEST_TIMEOUT_SECONDS)
    from weight_broker.v1 import attach_pb2 as pb

    try:
        connected.settimeout(REQUEST_TIMEOUT_SECONDS)
        request = pb.AttachRequest(serve_stage=pb.ServeStage(session_token=token))
        connected.send(request.SerializeToString())
        answer = connected.recv(MAX_PACKET_BYTES)
        if not answer:
            raise NotAttached("the broker closed the stage connection")
        response = pb.AttachResponse.FromString(answer)
        if response.WhichOneof("response") == "refused":
            raise decode_refusal(response.refused)
        connected.setblocking(False)
    except TimeoutError:
        connected.close()
        raise BrokerUnavailable(f"the broker does not answer on {path}") from None
    except OSError as error:
        connected.close()
        raise NotAttached(f"the broker closed the stage connection ({error.strerror or error})") from None
    except BaseException:
        connected.close()
        raise
    return connected


def _answer(connected: socket.socket, response: pb.StageResponse) -> bool:
    """Whether the broker is there still, and reads."""
    try:
        connected.send(response.SerializeToString(), socket.MSG_NOSIGNAL)
    except OSError:
        return False
    return True


_servers: weakref.WeakSet[StagingServer] = weakref.WeakSet()


def _forget_all() -> None:
    for server in list(_servers):
        server.forget()


def _close_all() -> None:
    for server in list(_servers):
        server.close()


os.register_at_fork(after_in_child=_forget_all)
atexit.register(_close_all)
