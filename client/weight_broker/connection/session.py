"""This process's attachment to its broker: one session at a time, renewed after a restart, never shared by a fork."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from weight_broker.connection import room
from weight_broker.connection.attach import AttachConnection
from weight_broker.connection.deadline import seconds_until
from weight_broker.connection.keeper import KEEPER
from weight_broker.errors import BrokerError, BrokerUnavailable, NotAttached, Reason, TransferFailed
from weight_broker.runtime_directory import ATTACH_SOCKET, runtime_directory

if TYPE_CHECKING:
    import grpc

    from weight_broker.connection.stage_server import StagingServer
    from weight_broker.v1.weight_broker_service_pb2_grpc import WeightBrokerServiceStub

Result = TypeVar("Result")

# Channels of a parent process: destroying them in a forked child could wait for threads that the child does not have.
_inherited_channels: list[grpc.Channel] = []


class Session:
    """The attach connection, its token, and a gRPC channel that is opened on first use."""

    def __init__(self, directory: Path, name: str, connect_timeout: float) -> None:
        self.connection = AttachConnection(directory / ATTACH_SOCKET, name)
        welcome = self.connection.connect(connect_timeout)
        self.instance_id = welcome.instance_id
        self.host_id = welcome.host_id
        self._token = welcome.session_token
        self._directory = directory
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._stub: WeightBrokerServiceStub | None = None
        self._staging: StagingServer | None = None
        self.has_ended = False
        """Whether this process has ended the session, with everything in it."""

    @property
    def staging(self) -> StagingServer:
        """The server of the broker's copy requests."""
        from weight_broker.connection.stage_server import StagingServer

        with self._lock:
            if self._staging is None:
                self._staging = StagingServer(self._directory / ATTACH_SOCKET, self._token)
            return self._staging

    @property
    def stub(self) -> WeightBrokerServiceStub:
        if self._stub is None:
            with room.importing():
                from weight_broker.connection.channel import open_channel
                from weight_broker.v1.weight_broker_service_pb2_grpc import WeightBrokerServiceStub

            with self._lock:
                if self._stub is None:
                    self._channel = open_channel(self.connection.grpc_socket)
                    self._stub = WeightBrokerServiceStub(self._channel)
        return self._stub

    @property
    def channel(self) -> grpc.Channel:
        """For the other services."""
        self.stub  # noqa: B018 - opens it
        if self._channel is None:
            raise NotAttached("this session has ended")
        return self._channel

    @property
    def metadata(self) -> tuple[tuple[str, bytes], ...]:
        """Identifies this process in every call."""
        from weight_broker.wire import TOKEN_METADATA_KEY

        return ((TOKEN_METADATA_KEY, self._token),)

    @property
    def is_over(self) -> bool:
        """True once the broker (or this process) has closed the attach connection."""
        return self.connection.is_over()

    def end(self) -> None:
        """Say goodbye: the broker retracts everything of this session. Running calls are cancelled."""
        self.has_ended = True
        if self._staging is not None:
            self._staging.close()
        with contextlib.suppress(BrokerError):
            self.connection.goodbye()
        self.connection.close()
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def break_off(self) -> None:
        """End the session without waiting, as nothing else is certain to undo what the broker did or may still do."""
        self.connection.break_off()

    def forget(self) -> None:
        """For a forked child: drop the parent's connection and channel; the broker does not notice."""
        self.connection.forget()
        if self._channel is not None:
            _inherited_channels.append(self._channel)


class Attachment:
    """Gives out the session; attaches when there is none or when it has ended."""

    def __init__(self, directory: Path | None, name: str, connect_timeout: float) -> None:
        self._directory = directory
        self._name = name
        self.connect_timeout = connect_timeout
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._failure: tuple[float, BrokerUnavailable] | None = None
        self._closed = False
        _attachments.add(self)

    def session(self, deadline: float | None = None) -> Session:
        """Attach, if need be, before `deadline` (monotonic seconds). Raises `BrokerUnavailable`."""
        session = self._session
        if session is not None and not session.is_over and not self._closed:
            return session
        asked = time.monotonic()
        if not self._lock.acquire(timeout=-1 if deadline is None else seconds_until(deadline, threading.TIMEOUT_MAX)):
            raise BrokerUnavailable("the broker does not answer another thread of this process, which attaches")
        try:
            if self._closed:
                raise BrokerUnavailable("this client is closed")
            if self._session is not None and not self._session.is_over:
                return self._session
            self._session = None
            if self._failure is not None and self._failure[0] >= asked:
                # Another thread failed while this thread waited for the lock: waiting threads must not try one after
                # the other.
                raise BrokerUnavailable(self._failure[1].message, metadata=self._failure[1].metadata)
            session = self._session = self._attach(seconds_until(deadline, self.connect_timeout))
        finally:
            self._lock.release()
        KEEPER.ring()  # publications of an earlier session have to be published again
        return session

    def _attach(self, timeout: float) -> Session:
        directory = self._directory if self._directory is not None else runtime_directory()
        try:
            session = Session(directory, self._name, timeout)
        except BrokerUnavailable as error:
            if timeout >= self.connect_timeout:  # a thread with more time may succeed
                self._failure = time.monotonic(), BrokerUnavailable(error.message, metadata=error.metadata)
            raise
        self._failure = None
        return session

    def run(self, action: Callable[[Session], Result], deadline: float | None = None) -> Result:
        """Run `action` with a session. If the broker does not know the session (it was restarted) or has lost its stage
        connection, and nothing was touched, attach again and run `action` once more, unless `deadline` (monotonic
        seconds) has passed. Raises `TransferFailed` if the broker was lost and tensors were touched."""
        session = self.session(deadline)
        try:
            return _attempt(action, session)
        except NotAttached as error:
            if _is_over(deadline):
                raise _unkept("there was no time left to attach again", error) from error
            is_kept = error.lacks_stage and not session.is_over
        except BrokerUnavailable as error:
            if error.reason is Reason.DRAINING or not session.is_over or self._closed or _is_over(deadline):
                raise
            is_kept = False
        if not is_kept:  # else `action` opens another stage connection by itself
            self._discard(session)
        try:
            return _attempt(action, self.session(deadline))
        except NotAttached as error:
            raise _unkept("is it restarted again and again?", error) from error

    def is_current(self, session: Session | None) -> bool:
        """True if `session` is in use and alive."""
        return session is not None and session is self._session and not session.is_over

    def end(self) -> None:
        """End the session for good: its publications are retracted."""
        with self._lock:
            self._closed = True
            session, self._session = self._session, None
        if session is not None:
            session.end()

    def fileno(self) -> int:
        """The attach socket's descriptor, to poll for its end; -1 if there is none."""
        session = self._session
        return session.connection.fileno() if session is not None else -1

    def forget_after_fork(self) -> None:
        """For a forked child: the session belongs to the parent; the child attaches on its next call."""
        self._lock = threading.Lock()
        session, self._session = self._session, None
        if session is not None:
            session.forget()

    def __del__(self) -> None:
        # The session has no user any more: publications keep their attachment alive.
        session = getattr(self, "_session", None)
        if session is not None:
            session.connection.leave()

    def _discard(self, session: Session) -> None:
        with self._lock:
            if self._session is session:
                self._session = None
                session.connection.leave()
                KEEPER.ring()


def _attempt(action: Callable[[Session], Result], session: Session) -> Result:
    try:
        return action(session)
    except (NotAttached, BrokerUnavailable) as error:
        if error.touched and error.reason is not Reason.DRAINING:
            # Whether or not this process has seen its attachment end by now.
            raise _interrupted(error) from error
        raise


def _is_over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline


def _unkept(why: str, error: NotAttached) -> BrokerError:
    """Attaching is not the caller's business, who could only load from disk."""
    text = f"the broker does not keep this process attached; {why} {error.message}"
    return BrokerUnavailable(text, touched=error.touched, quiesced=error.quiesced)


def _interrupted(error: BrokerError) -> BrokerError:
    """Touched tensors are not filled by a second call: to attach again helps only the next one."""
    text = f"the transfer was cut off after it had begun to write: {error.message}"
    return TransferFailed(text, touched=True, quiesced=error.quiesced, metadata=error.metadata)


_attachments: weakref.WeakSet[Attachment] = weakref.WeakSet()


def _forget_sessions() -> None:
    for attachment in list(_attachments):
        attachment.forget_after_fork()


os.register_at_fork(after_in_child=_forget_sessions)
