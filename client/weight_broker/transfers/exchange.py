"""What this process does with its broker: fill tensors, map them, publish them. One for each client."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from weight_broker.connection.session import Attachment, Session
from weight_broker.errors import BrokerError, InvalidArgument
from weight_broker.key import WeightSetKey
from weight_broker.memory.kind import Destination, Shared, Terms, kind_of
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
"""What to do if nobody holds the weight set."""


@dataclass(frozen=True, slots=True)
class Request:
    """What one acquisition is asked for with."""

    key: WeightSetKey
    timeout: float = 300.0
    """Seconds, for the whole call."""
    if_absent: IfAbsent = "load"
    group: LoadGroup | None = None
    """The engine that this process is a rank of."""
    keep: bool = False
    """Whether what arrived is kept, to be published as it is."""


@dataclass(frozen=True, slots=True)
class Filled:
    """The weights are in place."""

    report: AcquireReport
    shared: Shared | None
    """What can be published again, if it was asked for; the caller closes it."""


@dataclass(frozen=True, slots=True)
class Mapped:
    """The weights are views of the resident memory."""

    tensors: AttachedTensors
    shared: Shared | None
    """See `Filled`."""


class Exchange:
    """The attachment to the broker and the terms for all memory of this process."""

    def __init__(self, attachment: Attachment, terms: Terms) -> None:
        self.attachment = attachment
        self.terms = terms

    def fill(self, request: Request, tensors: Mapping[str, object]) -> Filled | ColdLoadLease:
        """Fills `tensors`, or returns the lease to load them. Raises `BrokerError`."""
        from weight_broker.memory.tensors import describe

        begun = time.monotonic()
        described = describe(tensors)
        described.require_writable()
        phases = {"describe": time.monotonic() - begun}
        destination = kind_of(described.device_kind).destination(described, self.terms)
        acquired = self._acquire(request, destination, begun, phases)
        if isinstance(acquired, ColdLoadLease):
            return acquired
        return Filled(acquired[0].report, acquired[1])

    def map(self, request: Request, framework: Framework) -> Mapped | ColdLoadLease:
        """Maps the resident memory, or returns the lease to load it. Raises `BrokerError`."""
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
    ) -> Publication:
        """Offers `tensors` as a source. Raises `BrokerError`."""
        from weight_broker.memory.tensors import describe

        deadline = time.monotonic() + checked_seconds("timeout", timeout)
        _check_key(key)
        described = describe(tensors)
        self.attachment.session()  # without a broker there is no point in copying
        prepared = lease.prepared if lease is not None else None
        shared = kind_of(described.device_kind).share(described, self.terms, deadline, prepared)
        left = max(deadline - time.monotonic(), 0.001)
        return self.publish_shared(key, shared, lease=lease, group=group, timeout=left)

    def publish_shared(
        self,
        key: WeightSetKey,
        shared: Shared,
        *,
        lease: ColdLoadLease | None = None,
        group: LoadGroup | None = None,
        timeout: float = PUBLISH_TIMEOUT_SECONDS,
    ) -> Publication:
        """Offers memory that is shared already, and takes it over: closes it if the publication fails."""
        deadline = time.monotonic() + timeout
        publication = Publication(self.attachment, key, shared, group=group)
        publication.announce(deadline=deadline, fencing_token=lease.fencing_token if lease is not None else 0)
        if lease is not None:
            lease.fulfilled()
        return publication

    def _acquire(
        self, request: Request, destination: Destination, begun: float, phases: dict[str, float]
    ) -> tuple[Acquired, Shared | None] | ColdLoadLease:
        _check_key(request.key)
        deadline = begun + checked_seconds("timeout", request.timeout)

        def run(session: Session) -> Acquired | ColdLoadLease:
            phases["attach"] = time.monotonic() - begun - phases.get("describe", 0.0)
            return _run(self.attachment, session, request, destination, deadline, begun, dict(phases))

        try:
            outcome = self.attachment.run(run)
        except BaseException as error:
            _close_after(destination, error)
            raise
        if isinstance(outcome, ColdLoadLease):
            _close_or_give_up(destination, outcome)
            return outcome
        shared = destination.keep() if request.keep else None
        destination.close()
        return outcome, shared


def _run(
    attachment: Attachment,
    session: Session,
    request: Request,
    destination: Destination,
    deadline: float,
    begun: float,
    phases: dict[str, float],
) -> Acquired | ColdLoadLease:
    from weight_broker.transfers.acquisition import IF_ABSENT, Acquisition, ColdLoadTold

    if_absent = IF_ABSENT[request.if_absent]
    from weight_broker.wire import lease_end

    acquisition = Acquisition(
        session, request.key, destination, if_absent, deadline, begun, phases, request.group
    )  # fmt: skip
    outcome = acquisition.run()
    if not isinstance(outcome, ColdLoadTold):
        return outcome
    lease = outcome.lease
    return ColdLoadLease(
        attachment,
        session,
        weight_set_id=lease.weight_set_id,
        fencing_token=lease.fencing_token,
        expires_at=lease_end(lease),
        touched=outcome.touched,
    )


def _close_after(destination: Destination, error: BaseException) -> None:
    """Only the broker's word says that nothing writes any more; the end of an export does not. What this process fills
    itself is settled once it has stopped, whatever the broker knows."""
    is_only_writer = destination.stop()
    if isinstance(error, BrokerError) and not error.quiesced and not is_only_writer:
        return
    try:
        destination.close()
        if isinstance(error, BrokerError):
            error.quiesced = True
    except BrokerError:
        if isinstance(error, BrokerError):
            error.touched, error.quiesced = True, False


def _close_or_give_up(destination: Destination, lease: ColdLoadLease) -> None:
    """A caller that gets an error instead of its lease cannot load: the next waiter is told to."""
    try:
        destination.close()
    except BaseException:
        with contextlib.suppress(BrokerError):  # most likely it has ended with the session
            lease.give_up("the memory to be filled cannot be used")
        raise


def _check_key(key: object) -> None:
    if not isinstance(key, WeightSetKey):
        raise InvalidArgument("key", key, "a WeightSetKey")


def checked_seconds(name: str, value: object) -> float:
    """A positive number of seconds, at most a week. Raises `InvalidArgument`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise InvalidArgument(name, value, "a positive number of seconds")
    return min(float(value), MAX_TIMEOUT_SECONDS)
