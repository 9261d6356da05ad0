"""Copies between this process's tensors and the broker's staging buffers at the broker's request.

One daemon thread for each session; it exists only while tensors are staged, as a source or as a destination. It sleeps
in poll() on a second connection to the attach socket (no gRPC, no periodic work). A forked child has neither the thread
nor the staged tensors: the memory belongs to the parent.

A staging buffer is a *bucket* on the wire, and in the names here.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from weight_broker.connection import room
from weight_broker.connection.attach import MAX_PACKET_BYTES, connect_to, decode_refusal
from weight_broker.connection.deadline import REQUEST_TIMEOUT_SECONDS, seconds_until
from weight_broker.connection.keeper import KEEPER
from weight_broker.errors import BrokerUnavailable, NotAttached

if TYPE_CHECKING:
    from weight_broker.v1 import attach_pb2 as pb
    from weight_broker.v1 import weight_set_pb2

_EXIT_SECONDS = 1.0

_logger = logging.getLogger("weight_broker")


class StagedTensors(Protocol):
    """Tensors of this process that are copied chunk by chunk. Called in the thread; exceptions become refusals."""

    def open(self, bucket: weight_set_pb2.Region) -> None:
        """Map a staging buffer on the tensors' device. Counted: other tensors of this process may have it open too."""

    def close(self, bucket_id: str) -> None:
        """Undo one `open`."""

    def copy(self, bucket_id: str, bucket_offset: int, content_offset: int, size: int, *, to_bucket: bool) -> None:
        """Copy a part of the content (CopyChunk in attach.proto) and wait for the copy."""


@dataclass(frozen=True, slots=True)
class _Staged:
    tensors: StagedTensors
    connection: socket.socket | None
    """On which the broker has learned of them. Of what is published it forgets them with the connection."""


class StagingServer:
    """The staging connection of one session."""

    def __init__(self, path: Path, token: bytes) -> None:
        self._path = path
        self._token = token
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        """A copy has ended, or the thread."""
        self._staged: dict[str, _Staged] = {}
        self._copying = ""
        """The stage_id whose tensors are being copied; empty if none are."""
        self._thread: threading.Thread | None = None
        self._socket: socket.socket | None = None
        self._is_lost = False
        """The connection has ended, and the thread has still to unmap what it had mapped."""
        self._bell = -1
        _servers.add(self)

    def add(self, stage_id: str, tensors: StagedTensors, timeout: float = REQUEST_TIMEOUT_SECONDS) -> None:
        """The broker may ask for these tensors from now on, on another connection if the one before has ended. Raises
        `BrokerUnavailable`, `NotAttached`."""
        deadline = time.monotonic() + timeout
        with self._lock:
            while self._thread is not None and self._has_ended():
                if not self._changed.wait(seconds_until(deadline, timeout)):
                    raise BrokerUnavailable("the staging connection has ended, and what was copied on it has not yet")
            if self._thread is None:
                self._start(seconds_until(deadline, timeout))
            self._staged[stage_id] = _Staged(tensors, self._socket)

    def remove(self, stage_id: str) -> None:
        """No copy of the tensors runs or begins after this returns. Idempotent."""
        with self._lock:
            self._staged.pop(stage_id, None)
            while self._copying == stage_id:
                self._changed.wait()
            if not self._staged:
                self._ring()

    def serves(self, stage_id: str) -> bool:
        """Whether the broker can ask for these tensors, and knows that it can."""
        staged = self._staged.get(stage_id)
        return staged is not None and staged.connection is self._socket is not None and not self._is_lost

    def close(self) -> None:
        """Stop serving; waits briefly for the thread."""
        with self._lock:
            self._staged.clear()
            thread = self._thread
            self._ring()
        if thread is not None and thread is not threading.current_thread():
            thread.join(_EXIT_SECONDS)

    def forget(self) -> None:
        """For a forked child: it has no thread and no staged tensors."""
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._staged, self._copying, self._thread, self._is_lost = {}, "", None, False
        connected, self._socket = self._socket, None
        if connected is not None:
            connected.close()
        bell, self._bell = self._bell, -1
        if bell >= 0:
            os.close(bell)

    def _start(self, timeout: float) -> None:
        """All of it, or nothing: a thread that could not start must not be believed to run."""
        with contextlib.ExitStack() as undo:
            bell = room.open_bell()
            undo.callback(os.close, bell)
            connected = _serve_stage(self._path, self._token, timeout)
            undo.callback(connected.close)
            thread = threading.Thread(target=self._run, args=(connected, bell), name="weight-broker-stage", daemon=True)
            self._socket, self._bell, self._thread = connected, bell, thread
            undo.callback(self._unset)
            room.start(thread)
            undo.pop_all()

    def _unset(self) -> None:
        self._socket, self._bell, self._thread = None, -1, None

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
        if is_lost:
            with self._lock:
                self._is_lost = True
        # Unmapped first: the end of the connection tells the broker that no staging buffer is mapped.
        for bucket_id, holders in opened.items():
            for tensors in holders:
                try:
                    tensors.close(bucket_id)
                except Exception:
                    _logger.exception("staging buffer %s could not be unmapped", bucket_id)
        connected.close()
        if is_lost and self._is_missed():
            KEEPER.ring()  # staged publications have to be published again

    def _is_needed(self) -> bool:
        """If False, this thread ends, and the next `add` starts another."""
        with self._lock:
            if not self._staged:
                self._leave()
            return bool(self._staged)

    def _is_missed(self) -> bool:
        """Whether tensors are still staged although the connection is lost. The next `add` starts another thread."""
        with self._lock:
            self._leave()
            return bool(self._staged)

    def _leave(self) -> None:
        bell, self._bell = self._bell, -1
        os.close(bell)
        self._thread = self._socket = None
        self._is_lost = False
        self._changed.notify_all()

    def _has_ended(self) -> bool:
        """Whether the broker asks nothing more on the connection, also if the thread does not know yet."""
        if self._socket is None or self._is_lost:
            return True
        poller = select.poll()
        poller.register(self._socket, select.POLLRDHUP)
        return bool(poller.poll(0))

    def _do(self, packet: bytes, opened: dict[str, list[StagedTensors]]) -> pb.StageResponse:
        from weight_broker.v1 import attach_pb2 as pb

        request = pb.StageRequest.FromString(packet)
        response = pb.StageResponse(number=request.number)
        try:
            self._act(request, opened)
        except Exception as error:  # noqa: BLE001 - the broker must get an answer, also to a defect
            _logger.warning("a staging request of the broker failed: %s", error)
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
            staged = self._staged.get(stage_id)
            if staged is None:
                raise ValueError(f"nothing is staged as {stage_id!r}")
            self._copying = stage_id
        try:
            yield staged.tensors
        finally:
            with self._lock:
                self._copying = ""
                self._changed.notify_all()


def _serve_stage(path: Path, token: bytes, timeout: float) -> socket.socket:
    """A connection on which the broker sends requests. Raises `BrokerUnavailable`, `NotAttached`: whether the session
    is over too, only its own connection says."""
    deadline = time.monotonic() + timeout
    connected = connect_to(path, timeout)
    from weight_broker.v1 import attach_pb2 as pb

    try:
        connected.settimeout(seconds_until(deadline))
        request = pb.AttachRequest(serve_stage=pb.ServeStage(session_token=token))
        connected.send(request.SerializeToString())
        answer = connected.recv(MAX_PACKET_BYTES)
        if not answer:
            raise NotAttached.without_stage("the broker closed it")
        response = pb.AttachResponse.FromString(answer)
        if response.WhichOneof("response") == "refused":
            raise decode_refusal(response.refused)
        connected.setblocking(False)
    except TimeoutError:
        connected.close()
        raise BrokerUnavailable(f"the broker does not answer on {path}") from None
    except OSError as error:
        connected.close()
        raise NotAttached.without_stage(f"the broker closed it ({error.strerror or error})") from None
    except NotAttached as error:
        connected.close()
        raise NotAttached.without_stage(error.message) from error
    except BaseException:
        connected.close()
        raise
    return connected


def _answer(connected: socket.socket, response: pb.StageResponse) -> bool:
    """False if the broker does not read any more."""
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
