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

from weight_broker.connection import room
from weight_broker.connection.deadline import LAST_WORD_SECONDS, last_word, seconds_until
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
    from weight_broker.transfers.waiting import Waiting
    from weight_broker.v1 import resources_pb2, weight_set_pb2

_RESTORE_TIMEOUT_SECONDS = 10.0
_UNDO_TIMEOUT_SECONDS = 2.0
_LONGEST_ANSWER_SECONDS = 7 * 24 * 3600.0
_LET_GO_SECONDS = 0.02

_logger = logging.getLogger("weight_broker")


class Publication:
    """Resident until `retract`, the client's `close` or the end of the process, also without a reference to this
    object, its report or its client. After a restart of the broker the client publishes it again, by reference; `id`
    and `generation` then change.

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
        self.waiting: Waiting | None = None
        """Set while the publication waits for a check; `id` is empty until it is announced."""
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
                if self._closed:
                    raise PublicationNotFound("the publication was retracted before it was announced")
                KEEPER.add(self)  # first: what cannot be kept is not published
                self._attachment.run(lambda session: self._announce(session, deadline, fencing_token), deadline)
        except BaseException:
            with contextlib.suppress(RetractTimeout):  # the first error says more
                self._let_go(time.monotonic() + last_word(deadline, _UNDO_TIMEOUT_SECONDS))
            raise
        KEEPER.ring()  # there is a socket to watch now

    def restore(self) -> None:
        """Publish again if the session of the publication is over. Called by the keeper."""
        if not self._lock.acquire(blocking=False):
            return  # a retraction is running, or the first publication
        try:
            if self._session is None or not self._wanted:
                return  # what was never published is not published again
            if self._attachment.is_current(self._session) and self._shared.is_served:
                return
            self._attachment.run(self._announce_again)
            _logger.info("published weight set %s again, as %s", self.key.id, self.id)
        except BrokerError:
            if self._wanted:  # else its client is closing
                raise
        finally:
            self._lock.release()

    @property
    def route(self) -> object:
        """The attachment."""
        return self._attachment

    def fileno(self) -> int:
        """The attach socket; -1 before the first publication, which nothing but its own call can bring about."""
        return self._attachment.fileno() if self._session is not None else -1

    def retract(self, timeout: float = 60.0) -> None:
        """Returns when no reader is left. Idempotent. `RetractTimeout`: readers still run after `timeout` seconds; new
        readers are refused; call again. `BrokerUnavailable`: the broker lives, but its answer was lost twice; call
        again."""
        if self._process != os.getpid():
            raise PublicationNotFound(
                f"publication {self.id} belongs to process {self._process}; only that process can retract it",
                metadata={"publication_id": self.id},
            )
        deadline = time.monotonic() + timeout
        if not self._lock.acquire(timeout=min(max(timeout, 0.0), threading.TIMEOUT_MAX)):
            raise RetractTimeout(f"publication {self.id} is being published again, which has not ended yet; call again")
        try:
            if self._closed:
                return
            self._wanted = False
            session = self._session
            if session is not None and not session.has_ended:
                # Also if the attach connection is lost: the broker, if it lives, serves on for as long as this process.
                self._retract(session, deadline)
            # A publication of another broker is gone with it. Readers that hold sealed memory can finish.
            self._let_go(deadline)
        finally:
            self._lock.release()

    @property
    def needs_retraction(self) -> bool:
        """Whether others read this process's own memory, which may change only after a retraction."""
        return self._shared.needs_retraction and not self.is_retracted

    def expire(self) -> None:
        """Not published again once its session ends."""
        self._wanted = False
        KEEPER.remove(self)

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
        state = "retracted" if self.is_retracted else "published" if self.id else "waiting"
        return f"Publication(id={self.id!r}, model={self.key.model!r}, {self.size_bytes} bytes, {state})"

    def _announce(self, session: Session, deadline: float, fencing_token: int) -> None:
        with room.importing():
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
        is_asked = False
        try:
            for index, region in enumerate(regions):
                offered.append(region)
                self._shared.hand_over(session.connection, region, index, seconds_until(deadline))
            is_asked = True
            published = publish(timeout=seconds_until(deadline, _LONGEST_ANSWER_SECONDS))
            self._shared.note(published)
            self.id, self.generation = published.publication_id, published.generation
            self._session, self._regions = session, regions
        except BaseException as error:
            if is_asked and not _is_refusal(error) and not session.is_over:
                _undo(session, publish, last_word(deadline, _UNDO_TIMEOUT_SECONDS))
            self._take_back(session, offered, last_word(deadline))
            raise

    def _announce_again(self, session: Session) -> None:
        self._retract_former()
        self._announce(session, time.monotonic() + _RESTORE_TIMEOUT_SECONDS, 0)

    def _retract_former(self) -> None:
        """What was published in a session whose connection is lost, or on a stage connection that is, if its broker
        lives and has not ended it. No new reader finds it then; those that run need no answer."""
        from weight_broker.transfers import calls

        former = self._session
        if former is not None and not former.has_ended:
            with contextlib.suppress(BrokerError):  # another broker does not know it
                calls.retract(former, self.id, timeout=_UNDO_TIMEOUT_SECONDS)

    def _retract(self, session: Session, deadline: float) -> None:
        try:
            self._ask_to_retract(session, deadline)
        except BrokerUnavailable:  # only the connection of the call was cut, perhaps
            self._ask_to_retract(session, deadline)
        self._take_back(session, self._regions, last_word(deadline))

    def _ask_to_retract(self, session: Session, deadline: float) -> None:
        from weight_broker.transfers import calls

        try:
            calls.retract(session, self.id, timeout=seconds_until(deadline, _LONGEST_ANSWER_SECONDS))
        except (PublicationNotFound, NotAttached):
            pass  # the publication has ended already
        except BrokerUnavailable:
            if not session.is_over:
                raise

    def _take_back(self, session: Session, regions: list[weight_set_pb2.Region], timeout: float) -> None:
        """A session that is over has no regions."""
        for region in regions:
            if session.is_over:
                return
            try:
                self._shared.take_back(session.connection, region, timeout)
            except BrokerUnavailable:  # the request is there, and the broker does it once it reads
                timeout = LAST_WORD_SECONDS / 10
            except BrokerError:
                pass

    def _let_go(self, deadline: float = 0.0) -> None:
        """End the sharing. Processes that have device memory mapped get until `deadline` (monotonic seconds) to unmap
        it: a broker's processes end soon after the broker."""
        self.expire()
        while True:
            try:
                self._shared.close()
                break
            except RetractTimeout:
                if time.monotonic() >= deadline:
                    _mapped.add(self)
                    raise
                time.sleep(_LET_GO_SECONDS)
        self._closed = True
        _mapped.discard(self)


def publications_of(attachment: Attachment) -> list[Publication]:
    """The publications of this process through `attachment`."""
    return [
        publication
        for publication in list(_publications)
        if publication._attachment is attachment and not publication.is_retracted
    ]


def _is_refusal(error: BaseException) -> bool:
    """Whether the broker has said that nothing is published. After a lost answer, an interruption or a defect nothing
    is known."""
    unknown = (Reason.BROKER_UNAVAILABLE, Reason.INTERNAL)
    return isinstance(error, BrokerError) and error.reason not in unknown


def _undo(session: Session, publish: Callable[..., resources_pb2.Publication], timeout: float) -> None:
    """For a request whose answer was lost: ask again, which returns the publication, and retract it. If that fails,
    end the session, which ends the publication too: without its id it could not be retracted later."""
    from weight_broker.transfers import calls

    deadline = time.monotonic() + timeout
    try:
        publication_id = publish(timeout=timeout).publication_id
        calls.retract(session, publication_id, timeout=seconds_until(deadline))
    except BrokerError as error:
        # NotAttached: the repetition was refused, which says nothing of the request before it.
        if not _is_refusal(error) or isinstance(error, (RetractTimeout, NotAttached)):
            session.break_off()


_publications: weakref.WeakSet[Publication] = weakref.WeakSet()
_mapped: set[Publication] = set()
"""What the driver did not let go of. The client's `close` ends it, also where the caller never got the publication."""


def _forget_publications() -> None:
    for publication in list(_publications):
        publication.forget_after_fork()


os.register_at_fork(after_in_child=_forget_publications)
