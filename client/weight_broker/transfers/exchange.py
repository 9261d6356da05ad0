"""Fills, maps and publishes tensors through the broker. One exchange for each client."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from weight_broker.connection import room
from weight_broker.connection.deadline import LAST_WORD_SECONDS, last_word, seconds_until
from weight_broker.connection.session import Attachment, Session
from weight_broker.drivers.error import DriverError
from weight_broker.errors import AcquireTimeout, BrokerError, InvalidArgument
from weight_broker.key import WeightSetKey
from weight_broker.memory.kind import Destination, Shared, Sharing, Terms, kind_of
from weight_broker.transfers.checked import Check, announce
from weight_broker.transfers.lease import ColdLoadLease
from weight_broker.transfers.publication import Publication
from weight_broker.transfers.report import AcquireReport, AttachedTensors

if TYPE_CHECKING:
    from weight_broker.load_group import LoadGroup
    from weight_broker.transfers.acquisition import Acquired

MAX_TIMEOUT_SECONDS = 7 * 24 * 3600.0
PUBLISH_TIMEOUT_SECONDS = 60.0
Framework = Literal["torch", "numpy"]
IfAbsent = Literal["fail", "wait", "load"]
"""What the broker does if there is no source: refuse, wait for a load, or grant the lease to load."""

_logger = logging.getLogger("weight_broker")


@dataclass(frozen=True, slots=True)
class Request:
    """The caller's part of one acquisition."""

    key: WeightSetKey
    timeout: float = 300.0
    """Seconds, for the whole call."""
    if_absent: IfAbsent = "load"
    group: LoadGroup | None = None
    """The engine that this process is a rank of."""
    keep: bool = False
    """Whether the filled or mapped memory is kept, to be published."""


@dataclass(frozen=True, slots=True)
class Filled:
    report: AcquireReport
    shared: Shared | None
    """The memory to publish, if `Request.keep`; the caller closes it."""


@dataclass(frozen=True, slots=True)
class Mapped:
    tensors: AttachedTensors
    shared: Shared | None
    """As in `Filled`."""


class Exchange:
    """The attachment to the broker and the terms for all memory of this process."""

    def __init__(self, attachment: Attachment, terms: Terms) -> None:
        self.attachment = attachment
        self.terms = terms
        self._patience: float | None = None
        """Seconds for an answer before the next publication. The last acquisition ended at its deadline: the broker may
        have stopped."""
        self._left: list[Sharing] = []
        """The sharing of memory to which something may still write."""

    def fill(self, request: Request, tensors: Mapping[str, object]) -> Filled | ColdLoadLease:
        """Fills `tensors`, or returns the lease to load them. Raises `BrokerError`."""
        with room.importing():
            from weight_broker.memory.from_host import destination as destination_of
            from weight_broker.memory.tensors import describe

        begun = time.monotonic()
        described = describe(tensors)
        described.require_writable()
        phases = {"describe": time.monotonic() - begun}
        destination = destination_of(described, self.terms)
        acquired = self._acquire(request, destination, begun, phases)
        if isinstance(acquired, ColdLoadLease):
            return acquired
        return Filled(acquired[0].report, acquired[1])

    def map(self, request: Request, framework: Framework) -> Mapped | ColdLoadLease:
        """Maps the resident memory, or returns the lease to load it. Raises `BrokerError`."""
        with room.importing():
            from weight_broker.memory.host.destination import TensorMapper

        begun = time.monotonic()
        if framework not in ("torch", "numpy"):
            raise InvalidArgument("framework", framework, "'torch' or 'numpy'")
        destination = TensorMapper(framework, self.terms.digest_mode)
        acquired = self._acquire(request, destination, begun, {})
        if isinstance(acquired, ColdLoadLease):
            return acquired
        received, report = acquired[0].received, acquired[0].report
        return Mapped(AttachedTensors(received.tensors, received.layout, report), acquired[1])

    def publish(
        self,
        key: WeightSetKey,
        tensors: Mapping[str, object],
        *,
        lease: ColdLoadLease | None = None,
        group: LoadGroup | None = None,
        timeout: float = PUBLISH_TIMEOUT_SECONDS,
        check: Check | None = None,
        in_host_memory: bool = False,
    ) -> Publication:
        """Offers `tensors` as a source, with a `check` only once that has found nothing. `in_host_memory`: as a copy
        there, also of device memory. Raises `BrokerError`."""
        with room.importing():
            from weight_broker.memory.tensors import describe
            from weight_broker.memory.to_host import share_copy

        deadline = time.monotonic() + checked_seconds("timeout", timeout)
        _check_key(key)
        described = describe(tensors)
        self._require_broker(deadline)
        if in_host_memory:
            shared = share_copy(described, self.terms, deadline)
        else:
            prepared = lease.prepared if lease is not None else None
            shared = kind_of(described.device_kind).share(described, self.terms, deadline, prepared)
        remaining = max(deadline - time.monotonic(), 0.001)
        if check is None:
            return self.publish_shared(key, shared, lease=lease, group=group, timeout=remaining)
        publication = Publication(self.attachment, key, shared, group=group)
        announce(publication, check, lease, remaining)
        return publication

    def publish_shared(
        self,
        key: WeightSetKey,
        shared: Shared,
        *,
        lease: ColdLoadLease | None = None,
        group: LoadGroup | None = None,
        timeout: float = PUBLISH_TIMEOUT_SECONDS,
    ) -> Publication:
        """Publish memory that is shared already. The exchange takes `shared` over and closes it if publishing fails."""
        deadline = time.monotonic() + timeout
        publication = Publication(self.attachment, key, shared, group=group)
        publication.announce(deadline=deadline, fencing_token=lease.fencing_token if lease is not None else 0)
        if lease is not None:
            lease.fulfilled()
        return publication

    def leave(self, sharing: Sharing) -> None:
        """What cannot be ended now ends with the client."""
        self._left.append(sharing)

    def let_go(self) -> None:
        """End what was left. For a client that has ended its session: no broker begins to write to the memory."""
        for sharing in list(self._left):
            try:
                sharing.close()
            except (BrokerError, DriverError) as error:  # the next call tries again
                _logger.warning("memory that was to be filled is still shared: %s", error)
            else:
                self._left.remove(sharing)

    def _require_broker(self, deadline: float) -> None:
        """Without a broker the copy would be in vain. Raises `BrokerUnavailable`."""
        session = self.attachment.session(deadline)
        if self._patience is not None:
            from weight_broker.transfers import calls

            calls.require_answer(session, seconds_until(deadline, self._patience))
            self._patience = None

    def _acquire(
        self, request: Request, destination: Destination, begun: float, phases: dict[str, float]
    ) -> tuple[Acquired, Shared | None] | ColdLoadLease:
        _check_key(request.key)
        deadline = begun + checked_seconds("timeout", request.timeout)

        def run(session: Session) -> Acquired | ColdLoadLease:
            phases["attach"] = time.monotonic() - begun - phases.get("describe", 0.0)
            return self._run(session, request, destination, deadline, begun, dict(phases))

        try:
            outcome = self.attachment.run(run, deadline)
        except BaseException as error:
            self._close_after(destination, error)
            raise
        if isinstance(outcome, ColdLoadLease):
            self._close_or_give_up(destination, outcome, deadline)
            return outcome
        shared = destination.keep() if request.keep else None
        self._close(destination)
        return outcome, shared

    def _run(
        self,
        session: Session,
        request: Request,
        destination: Destination,
        deadline: float,
        begun: float,
        phases: dict[str, float],
    ) -> Acquired | ColdLoadLease:
        with room.importing():
            from weight_broker.transfers.acquisition import IF_ABSENT, Acquisition, LeaseGranted
            from weight_broker.wire import lease_end

        if_absent = IF_ABSENT[request.if_absent]
        acquisition = Acquisition(
            session, request.key, destination, if_absent, deadline, begun, phases, request.group
        )  # fmt: skip
        self._patience = None
        try:
            outcome = acquisition.run()
        except AcquireTimeout:
            is_answered = acquisition.is_answered
            self._patience = self.attachment.connect_timeout if is_answered else LAST_WORD_SECONDS
            raise
        if not isinstance(outcome, LeaseGranted):
            return outcome
        lease, failure = outcome.lease, outcome.failure
        return ColdLoadLease(
            self.attachment,
            session,
            weight_set_id=lease.weight_set_id,
            fencing_token=lease.fencing_token,
            expires_at=lease_end(lease),
            touched=outcome.touched,
            failure=f"{type(failure).__name__}: {failure}" if failure is not None else None,
        )

    def _close_after(self, destination: Destination, error: BaseException) -> None:
        """Only the broker's word says that nothing writes any more; the end of an export does not. What this process
        fills itself is settled once it has stopped, whatever the broker knows."""
        is_only_writer = destination.stop()
        if isinstance(error, BrokerError) and not error.quiesced and not is_only_writer:
            self._abandon(destination)
            return
        try:
            self._close(destination)
            if isinstance(error, BrokerError):
                error.quiesced = True
        except BrokerError:
            if isinstance(error, BrokerError):
                error.touched, error.quiesced = True, False

    def _close_or_give_up(self, destination: Destination, lease: ColdLoadLease, deadline: float) -> None:
        """If closing fails, the caller gets an error instead of its lease, and the lease goes to the next waiter."""
        try:
            self._close(destination)
        except BaseException:
            with contextlib.suppress(BrokerError):  # usually the lease has ended with the session
                lease.give_up("the memory to be filled cannot be used", timeout=last_word(deadline))
            raise

    def _close(self, destination: Destination) -> None:
        try:
            destination.close()
        except BrokerError:
            self._abandon(destination)
            raise

    def _abandon(self, destination: Destination) -> None:
        sharing = destination.abandon()
        if sharing is not None:
            self.leave(sharing)


def _check_key(key: object) -> None:
    if not isinstance(key, WeightSetKey):
        raise InvalidArgument("key", key, "a WeightSetKey")


def checked_seconds(name: str, value: object) -> float:
    """A positive number of seconds, at most a week. Raises `InvalidArgument`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InvalidArgument(name, value, "a positive number of seconds")
    return float(min(value, MAX_TIMEOUT_SECONDS))
