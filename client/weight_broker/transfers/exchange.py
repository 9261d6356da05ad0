"""What this process does with its broker: fill tensors, map them, publish them. One for each client."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from weight_broker.connection.session import Attachment, Session
from weight_broker.errors import BrokerError, InvalidArgument, PublishRefused
from weight_broker.key import WeightSetKey
from weight_broker.kinds import TRAITS
from weight_broker.memory.described import DescribedTensors
from weight_broker.memory.kind import Destination, Prepared, Shared, Terms, kind_of
from weight_broker.memory.policy import StagingPolicy
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
_logger = logging.getLogger("weight_broker")


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
        kind, touched = kind_of(described.device_kind), False
        try:
            destination = kind.destination(described, self._terms_first(described))
            acquired = self._acquire(request, destination, begun, phases)
        except BrokerError as error:
            if not self._may_stage(described, error):
                raise
            touched = error.touched
            try:
                staged = replace(self.terms, staging=StagingPolicy.STAGED)
                acquired = self._acquire(request, kind.destination(described, staged), begun, phases)
            except BrokerError as second:
                second.touched = second.touched or touched
                raise
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
        shared = self._share(described, deadline, prepared)
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
        token = lease.fencing_token if lease is not None else 0
        publication = Publication(self.attachment, key, shared, group=group)
        try:
            publication.announce(deadline=deadline, fencing_token=token)
        except PublishRefused as error:
            alternative = self._alternative(shared, error)
            if alternative is None:
                raise
            publication = Publication(self.attachment, key, alternative, group=group)
            publication.announce(deadline=deadline, fencing_token=token)
        if lease is not None:
            lease.fulfilled()
        return publication

    def _terms_first(self, described: DescribedTensors) -> Terms:
        is_auto = self.terms.staging is StagingPolicy.AUTO and TRAITS[described.device_kind].can_be_staged
        return replace(self.terms, staging=StagingPolicy.DIRECT) if is_auto else self.terms

    def _may_stage(self, described: DescribedTensors, error: BrokerError) -> bool:
        may = self._terms_first(described) is not self.terms and error.metadata.get("path") == "staged"
        if may and error.quiesced:
            _logger.warning("using a staged transfer: %s", error)
        return may and error.quiesced

    def _share(self, described: DescribedTensors, deadline: float, prepared: Prepared | None) -> Shared:
        kind, first = kind_of(described.device_kind), self._terms_first(described)
        try:
            return kind.share(described, first, deadline, prepared)
        except PublishRefused as error:
            if first is self.terms:
                raise
            _logger.warning("using a staged transfer: %s", error)
            return kind.share(described, replace(self.terms, staging=StagingPolicy.STAGED), deadline, prepared)

    def _alternative(self, shared: Shared, error: PublishRefused) -> Shared | None:
        from weight_broker.memory.device.shared import DeviceShared

        if not isinstance(shared, DeviceShared) or not self._may_stage(shared.described, error):
            return None
        return shared.staged_instead()

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
        expires_at=lease.expire_time.ToNanoseconds() / 1e9,
        touched=outcome.touched,
    )


def _close_after(destination: Destination, error: BaseException) -> None:
    """The broker's word is that nothing writes any more; the driver's word counts more. What this process fills itself
    is settled once it has stopped, whatever the broker knows."""
    if isinstance(error, BrokerError) and not error.quiesced and not destination.is_filled_here:
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
