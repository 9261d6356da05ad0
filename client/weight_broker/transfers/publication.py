"""A weight set that this process offers as a source."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

from weight_broker.connection.keeper import KEEPER
from weight_broker.connection.session import Attachment, Session
from weight_broker.errors import (
    BrokerError,
    BrokerUnavailable,
    NotAttached,
    PublicationNotFound,
    Reason,
    RetractTimeout,
)
from weight_broker.key import WeightSetKey
from weight_broker.layout import Layout
from weight_broker.load_group import LoadGroup
from weight_broker.memory.kind import Shared

if TYPE_CHECKING:
    from weight_broker.v1 import resources_pb2, weight_set_pb2

_RESTORE_TIMEOUT_SECONDS = 10.0
_UNDO_TIMEOUT_SECONDS = 2.0
_LET_GO_SECONDS = 0.02

_logger = logging.getLogger("weight_broker")


class Publication:
    """Resident until `retract`, the client's `close` or the end of the process. After a restart of the broker the
    client publishes it again, by reference; `id` and `generation` then change.

    A context manager: retracted at the end of the block.
    """

    def __init__(
        self,
        attachment: Attachment,
        key: WeightSetKey,
        shared: Shared,
        *,
        group: LoadGroup | None = None,
    ) -> None:
        self.key = key
        self.group = group
        self.layout: Layout = shared.layout
        self.id = ""
        self.generation = 0
        self._attachment = attachment
        self._shared = shared
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._regions: list[weight_set_pb2.Region] = []
        self._wanted = True
        self._closed = False
        _publications.add(self)

    @property
    def size_bytes(self) -> int:
        """Bytes of content, aliases counted once."""
        return self.layout.content_bytes

    @property
    def is_retracted(self) -> bool:
        """True after the retraction, and in a forked child: the publication belongs to the parent."""
        return self._closed or self._process != os.getpid()

    def announce(self, *, deadline: float, fencing_token: int = 0) -> None:
        """Publish for the first time; on an exception nothing stays published. `deadline` in monotonic seconds."""
        try:
            with self._lock:
                self._attachment.run(lambda session: self._announce(session, deadline, fencing_token))
        except BaseException:
            with contextlib.suppress(RetractTimeout):  # the first error says more
                self._let_go(time.monotonic() + _UNDO_TIMEOUT_SECONDS)
            raise
        KEEPER.add(self)

    def restore(self) -> None:
        """Publish again if the session of the publication is over. Called by the keeper."""
        if not self._lock.acquire(blocking=False):
            return  # a retraction is running
        try:
            if not self._wanted or (self._attachment.is_current(self._session) and self._shared.is_served):
                return
            session = self._attachment.session()
            self._announce(session, time.monotonic() + _RESTORE_TIMEOUT_SECONDS, 0)
            _logger.info("published weight set %s again, as %s", self.key.id, self.id)
        finally:
            self._lock.release()

    @property
    def route(self) -> object:
        """The attachment."""
        return self._attachment

    def fileno(self) -> int:
        """The attach socket."""
        return self._attachment.fileno()

    def retract(self, timeout: float = 60.0) -> None:
        """Returns when no reader is left. Idempotent. `RetractTimeout`: readers still run after `timeout` seconds; new
        readers are refused; call again."""
        if self._process != os.getpid():
            raise PublicationNotFound(
                f"publication {self.id} belongs to process {self._process}; only that process can retract it",
                metadata={"publication_id": self.id},
            )
        deadline = time.monotonic() + timeout
        with self._lock:
            if self._closed:
                return
            self._wanted = False
            session = self._session
            if session is not None and self._attachment.is_current(session):
                self._retract(session, timeout)
            # Otherwise the publication is gone with its broker. Readers that hold sealed memory can finish.
            self._let_go(deadline)

    @property
    def needs_retraction(self) -> bool:
        """Whether others read this process's own memory, which may change only after a retraction."""
        return self._shared.needs_retraction and not self.is_retracted

    def abandon(self) -> None:
        """Close the memory. For a client that has ended its session, which retracts everything."""
        with self._lock:
            self._wanted = False
            self._let_go()

    def forget_after_fork(self) -> None:
        """For a forked child: the publication belongs to the parent, whose threads may hold the lock."""
        self._lock = threading.Lock()
        self._wanted = False

    def __enter__(self) -> Publication:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process == os.getpid():
            self.retract()

    def __repr__(self) -> str:
        state = "retracted" if self.is_retracted else "published"
        return f"Publication(id={self.id!r}, model={self.key.model!r}, {self.size_bytes} bytes, {state})"

    def _announce(self, session: Session, deadline: float, fencing_token: int) -> None:
        from weight_broker.transfers import calls

        batch = uuid.uuid4().hex
        regions = self._shared.regions(batch)
        offered: list[weight_set_pb2.Region] = []
        publish = partial(
            calls.publish,
            session,
            self.key,
            self._shared,
            regions,
            fencing_token=fencing_token,
            request_id=batch,
            group=self.group,
        )
        try:
            for index, region in enumerate(regions):
                self._shared.hand_over(session.connection, region, index)
                offered.append(region)
            published = publish(timeout=max(deadline - time.monotonic(), 0.001))
        except BaseException as error:
            answer_lost = isinstance(error, BrokerUnavailable) and error.reason is Reason.BROKER_UNAVAILABLE
            if answer_lost and not session.is_over:
                _undo(session, publish)
            self._take_back(session, offered)
            raise
        self.id, self.generation = published.publication_id, published.generation
        self._session, self._regions = session, regions
        self._shared.note(published)

    def _retract(self, session: Session, timeout: float) -> None:
        from weight_broker.transfers import calls

        try:
            calls.retract(session, self.id, timeout=timeout)
        except (PublicationNotFound, NotAttached):
            pass  # the publication has ended already
        except BrokerUnavailable:
            if not session.is_over:
                raise
        self._take_back(session, self._regions)

    def _take_back(self, session: Session, regions: list[weight_set_pb2.Region]) -> None:
        for region in regions:
            with contextlib.suppress(BrokerError):  # a session that is over has no regions
                self._shared.take_back(session.connection, region)

    def _let_go(self, deadline: float = 0.0) -> None:
        """End the sharing. Processes that have device memory mapped get until `deadline` (monotonic seconds) to unmap
        it: a broker's processes end soon after the broker."""
        self._wanted = False
        KEEPER.remove(self)
        while True:
            try:
                self._shared.close()
                break
            except RetractTimeout:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_LET_GO_SECONDS)
        self._closed = True


def publications_of(attachment: Attachment) -> list[Publication]:
    """The publications of this process through `attachment`."""
    return [
        publication
        for publication in list(_publications)
        if publication._attachment is attachment and not publication.is_retracted
    ]


def _undo(session: Session, publish: Callable[..., resources_pb2.Publication]) -> None:
    """For a request whose answer was lost: ask again, which returns the publication, and retract it."""
    from weight_broker.transfers import calls

    with contextlib.suppress(BrokerError):  # the end of the session ends the publication too
        calls.retract(session, publish(timeout=_UNDO_TIMEOUT_SECONDS).publication_id, timeout=_UNDO_TIMEOUT_SECONDS)


_publications: weakref.WeakSet[Publication] = weakref.WeakSet()


def _forget_publications() -> None:
    for publication in list(_publications):
        publication.forget_after_fork()


os.register_at_fork(after_in_child=_forget_publications)
