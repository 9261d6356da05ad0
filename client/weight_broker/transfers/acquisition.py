"""One acquire call on one session: read the stream, take the bytes from each granted source, report each transfer."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import grpc

from weight_broker.connection.channel import decode_error, late
from weight_broker.connection.deadline import LAST_WORD_SECONDS, last_word, seconds_until
from weight_broker.connection.session import Session
from weight_broker.errors import (
    AcquireTimeout,
    BrokerError,
    BrokerUnavailable,
    IntegrityError,
    NotAttached,
    Reason,
    TransferFailed,
)
from weight_broker.key import WeightSetKey
from weight_broker.load_group import LoadGroup
from weight_broker.memory.kind import Destination, Received
from weight_broker.transfers import calls
from weight_broker.transfers.grant_deadline import cancelled_without_grant
from weight_broker.transfers.report import AcquireReport
from weight_broker.transfers.waiting_log import WaitingLog
from weight_broker.v1 import resources_pb2
from weight_broker.v1 import weight_broker_service_pb2 as pb
from weight_broker.wire import key_to_wire, layout_to_wire, load_group_to_wire

IF_ABSENT = {"fail": pb.IF_ABSENT_FAIL, "wait": pb.IF_ABSENT_WAIT, "load": pb.IF_ABSENT_LOAD}
"""What the broker does if there is no source."""

_LEAST_SECONDS = 0.001
"""A request has some time, also if the attachment took all there was: the broker then says that it has passed."""
_PHASE_NAMES = {value: name for name, value in calls.PHASES.items()}
_DATA_PLANES = {
    resources_pb2.DATA_PLANE_LOCAL: "local",
    resources_pb2.DATA_PLANE_PEER_COPY: "peer_copy",
    resources_pb2.DATA_PLANE_DATASYSTEM: "datasystem",
}
_PATHS = {
    resources_pb2.TRANSFER_PATH_COPY: "copy",
    resources_pb2.TRANSFER_PATH_ZERO_COPY: "zero_copy",
    resources_pb2.TRANSFER_PATH_STAGED: "staged",
}

# Once every byte is in place and verified, these concern the broker, not the weights.
_BROKER_GONE = (Reason.BROKER_UNAVAILABLE, Reason.NOT_ATTACHED, Reason.ACQUIRE_TIMEOUT, Reason.INTERNAL)

_logger = logging.getLogger("weight_broker")


@dataclass(slots=True)
class Acquired:
    report: AcquireReport
    received: Received


@dataclass(frozen=True, slots=True)
class LeaseGranted:
    """This process must load from disk."""

    lease: resources_pb2.ColdLoadLease
    touched: bool
    failure: BrokerError | None
    """Why the last source did not deliver, if there was one."""


@dataclass(slots=True)
class Acquisition:
    """The state of one acquire call."""

    session: Session
    key: WeightSetKey
    destination: Destination
    if_absent: pb.IfAbsent.ValueType
    deadline: float
    """Monotonic seconds."""
    begun: float
    """When the caller's call began, in monotonic seconds."""
    phases: dict[str, float]
    """Seconds by phase, the caller's own phases included."""
    group: LoadGroup | None = None
    """The engine that this process is a rank of."""
    is_answered: bool = False
    """Whether the broker has said anything at all."""
    _touched: bool = False
    _last_failure: BrokerError | None = None
    _granted: pb.Granted | None = None
    _received: Received | None = None
    _mark: float = field(default_factory=time.monotonic)
    _waiting: bool = False
    _own_lease: bool = False
    """Whether the call waits for a lease that this very session holds."""
    _is_filled: bool = False
    """Whether the broker may be writing to this process's memory."""

    def run(self) -> Acquired | LeaseGranted:
        """Return with every byte in place and verified, or with the lease; raise a `BrokerError` otherwise. Any
        exception cancels the stream, which frees the source's reader slot. The caller keeps the destination."""
        self._mark = time.monotonic()
        stub, metadata = self.session.stub, self.session.metadata
        stream = None
        try:
            request = self._request()
            grace = self.destination.grace_seconds
            stream = stub.Acquire(request, timeout=self._remaining() + grace, metadata=metadata)
            if not grace:
                return self._follow(stream)
            with cancelled_without_grant(stream.cancel, lambda: self._granted is not None, self.deadline):
                return self._follow(stream)
        finally:
            try:
                if self._is_filled:  # an interruption: the caller may use the memory next
                    self._stop_filling()
            finally:
                if stream is not None:
                    stream.cancel()

    def _follow(self, stream: Iterator[pb.AcquireResponse]) -> Acquired | LeaseGranted:
        waiting_log = WaitingLog(self.key.model)
        try:
            for response in stream:
                self.is_answered = True
                if response.WhichOneof("event") != "waiting":
                    waiting_log.end()
                match response.WhichOneof("event"):
                    case "waiting":
                        self._end_wait()
                        self._waiting = True
                        self._note_holder(response.waiting)
                        waiting_log.note(response.waiting)
                    case "granted":
                        self._end_wait()
                        self._waiting = self._own_lease = False
                        report_error = self._transfer(response.granted)
                        if report_error is not None:
                            return self._without_answer(report_error)
                    case "moved":
                        report_error = self._verify(response.moved)
                        if report_error is not None:
                            return self._without_answer(report_error)
                    case "done":
                        self._pass("confirm")
                        return self._finished(response.done.report)
                    case "cold_load":
                        self._end_wait()
                        lease = response.cold_load.cold_load_lease
                        # The broker sends this once nothing writes any more; a source that was lost may have written.
                        self._touched, self._is_filled = self._touched or self._is_filled, False
                        self._confirm_lease(stream, lease)
                        return LeaseGranted(lease, self._touched, self._last_failure)
                    case _:  # progress of a transfer by the broker, or an event of a newer broker
                        pass
        except grpc.RpcError as error:
            return self._without_answer(self._decoded(error))
        finally:
            waiting_log.end()
        return self._without_answer(BrokerError("the broker ended the acquisition without an answer; report its log"))

    def _decoded(self, error: grpc.RpcError) -> BrokerError:
        filled, self._is_filled = self._is_filled, False
        on_deadline = Reason.ACQUIRE_TIMEOUT
        decoded = decode_error(error, on_deadline=on_deadline, touched=self._touched, broker_writes=filled)
        is_late = self.destination.grace_seconds and not self._granted and not self._remaining()
        if is_late and isinstance(decoded, BrokerUnavailable):  # this process cancelled the call
            return late(on_deadline, touched=decoded.touched, quiesced=decoded.quiesced)
        return decoded

    def _confirm_lease(self, stream: Iterator[pb.AcquireResponse], lease: resources_pb2.ColdLoadLease) -> None:
        """Read to the end of the stream, by which the broker tells a lease that arrived from a cancelled call. If that
        fails, this process does not load: the lease goes to the next waiter."""
        try:
            for _ in stream:
                pass
        except BaseException:
            weight_set_id, token = lease.weight_set_id, lease.fencing_token
            reason = "the grant did not arrive"
            with contextlib.suppress(BrokerError):  # usually the broker has ended the lease with the call
                calls.give_up_lease(self.session, weight_set_id, token, reason, timeout=LAST_WORD_SECONDS)
            raise

    def _note_holder(self, waiting: pb.Waiting) -> None:
        holder = waiting.cold_load_lease.instance_id
        self._own_lease = waiting.reason == pb.Waiting.REASON_COLD_LOAD and holder == self.session.instance_id

    def _request(self) -> pb.AcquireRequest:
        request = pb.AcquireRequest(key=key_to_wire(self.key), if_absent=self.if_absent, request_id=str(uuid.uuid4()))
        layout = self.destination.layout
        if layout is not None:
            layout_to_wire(layout, request.layout)
        if self.group is not None:
            request.load_group.CopyFrom(load_group_to_wire(self.group))
            request.assembly_timeout.FromNanoseconds(
                int(max(min(self.group.assembly_timeout, self._remaining()), _LEAST_SECONDS) * 1e9)
            )
        self.destination.fill_request(request, self.session, self.deadline)
        if self.destination.grace_seconds:
            request.timeout.FromNanoseconds(int(max(self._remaining(), _LEAST_SECONDS) * 1e9))
        return request

    def _transfer(self, granted: pb.Granted) -> BrokerError | None:
        """Take the bytes from one source and report, unless the broker brings the bytes: then `moved` follows. Returns
        why the broker did not take the report, if it did not."""
        self._granted, self._received = granted, None
        return self._report(granted, lambda: self.destination.take(granted, self._claim, self.deadline))

    def _verify(self, moved: pb.Moved) -> BrokerError | None:
        """The broker has brought the bytes; nothing writes any more."""
        granted = self._granted
        if granted is None or not self._is_filled:
            raise BrokerError("the broker moved a transfer without a grant; report its log", touched=self._touched)
        self._is_filled = False
        self._touched = True
        for phase_time in moved.phase_times:
            name = _PHASE_NAMES.get(phase_time.phase)
            if name is not None:
                self._add(name, phase_time.duration.ToNanoseconds() / 1e9)
        return self._report(granted, lambda: self.destination.verify(granted, moved, self.deadline))

    def _report(self, granted: pb.Granted, take: Callable[[], Received | None]) -> BrokerError | None:
        """Report how a transfer ended. After a failure that another source may cure, the broker's next event decides;
        any other failure is raised."""
        try:
            received = take()
        except (NotAttached, BrokerUnavailable) as error:
            error.touched = self._touched
            raise
        except BrokerError as error:
            self._touched = self._touched or error.touched
            cause, is_curable = _blame(error)
            report_error = self._fail(cause, error)
            if is_curable:
                return report_error
            raise
        if received is None:
            self._is_filled = True
            return None
        self._received = received
        # A source that was lost before may have written; nothing of it does any more.
        self._touched, self._is_filled = self._touched or self._is_filled or received.touched, False
        for name, seconds in received.seconds.items():
            self._add(name, seconds)
        self._mark = time.monotonic()
        return self._send_report(
            lambda: calls.report_success(
                self.session,
                granted.transfer_id,
                size_bytes=received.size_bytes,
                phases=self.phases,
                verified=received.verified,
                timeout=last_word(self.deadline),
            )
        )

    def _stop_filling(self) -> None:
        """Return when the broker writes no more, or cannot be reached."""
        self._is_filled = False
        granted = self._granted
        if granted is None:
            return
        try:
            calls.report_failure(
                self.session,
                granted.transfer_id,
                cause=pb.TransferFailed.CAUSE_RECEIVER,
                detail="interrupted",
                timeout=calls.GIVE_UP_TIMEOUT_SECONDS,
            )
        except BrokerError as error:
            _logger.error("the broker may still write to the tensors; discard their storages: %s", error)

    def _claim(self, index: int) -> int:
        """Open a region of the last granted source."""
        if self._granted is None:
            raise AssertionError("nothing is granted")
        try:
            timeout = seconds_until(self.deadline)
            return self.session.connection.claim_region(self._granted.transfer_id, index, timeout=timeout)
        except (NotAttached, BrokerUnavailable):
            raise
        except BrokerError as error:
            raise TransferFailed(f"the source's region {index} cannot be opened: {error}") from error

    def _fail(self, cause: pb.TransferFailed.Cause.ValueType, error: BrokerError) -> BrokerError | None:
        error.touched = self._touched
        self._last_failure = error
        granted = self._granted
        if granted is None:
            raise AssertionError("a transfer failed that was never granted")
        source = granted.source.publication_id
        _logger.warning("transfer %s from publication %s failed: %s", granted.transfer_id, source, error)
        detail = f"tensors {error.metadata['tensors']}" if error.metadata.get("tensors") else str(error)
        timeout = last_word(self.deadline)
        report_error = self._send_report(
            lambda: calls.report_failure(self.session, granted.transfer_id, cause=cause, detail=detail, timeout=timeout)
        )
        self._mark = time.monotonic()
        return report_error

    def _send_report(self, report: Callable[[], None]) -> BrokerError | None:
        """Returns why the broker did not take the report; None also if the broker has ended the transfer itself: then
        the stream says how."""
        try:
            report()
        except BrokerError as error:
            if error.reason is Reason.TRANSFER_NOT_FOUND:
                return None
            _logger.warning("the broker did not take the report on a transfer: %s", error)
            return error
        return None

    def _without_answer(self, error: BrokerError) -> Acquired:
        """The stream ended without `Done`."""
        # A rank of an engine is done only together with the others, which only the broker can confirm.
        if self._received is not None and self.group is None and error.reason in _BROKER_GONE:
            _logger.warning("every byte is in place and verified, but the broker did not confirm it: %s", error)
            return self._finished(None)
        error.touched = error.touched or self._touched
        if self._own_lease and error.reason is Reason.ACQUIRE_TIMEOUT:
            error = AcquireTimeout(
                f"{error.message}; it waited for a cold-load lease that this very process holds: publish with it, or "
                "give it up, before the next acquire",
                touched=error.touched,
                metadata=error.metadata,
            )
        failure = self._last_failure
        if failure is not None:
            error.metadata = {**failure.metadata, **error.metadata}
        raise error from failure

    def _finished(self, report: resources_pb2.TransferReport | None) -> Acquired:
        granted, received = self._granted, self._received
        if granted is None or received is None:
            raise BrokerError(
                "the broker completed an acquisition without a transfer; report its log", touched=self._touched
            )
        source = granted.source
        return Acquired(
            AcquireReport(
                weight_set_id=self.key.id,
                transfer_id=granted.transfer_id,
                source_instance=source.instance_id,
                source_instance_name=source.instance_name,
                source_publication_id=source.publication_id,
                source_generation=source.generation,
                size_bytes=report.size_bytes if report is not None else received.size_bytes,
                tensor_count=len(received.layout),
                phases=self.phases,
                seconds=time.monotonic() - self.begun,
                verified=received.verified,
                data_plane=_DATA_PLANES.get(granted.data_plane, "unknown"),
                path=_PATHS.get(granted.path, "unknown"),
            ),
            received,
        )

    def _remaining(self) -> float:
        return max(self.deadline - time.monotonic(), 0.0)

    def _end_wait(self) -> None:
        self._pass("wait" if self._waiting else "reserve")

    def _pass(self, phase: str) -> None:
        now = time.monotonic()
        self._add(phase, now - self._mark)
        self._mark = now

    def _add(self, phase: str, seconds: float) -> None:
        self.phases[phase] = self.phases.get(phase, 0.0) + seconds


def _blame(error: BrokerError) -> tuple[pb.TransferFailed.Cause.ValueType, bool]:
    """The cause to report, and whether another source may cure the failure."""
    if isinstance(error, IntegrityError):
        return pb.TransferFailed.CAUSE_DIGEST_MISMATCH, True
    if isinstance(error, TransferFailed) and not error.touched:  # the source's memory is not what it should be
        return pb.TransferFailed.CAUSE_SOURCE_UNREACHABLE, True
    return pb.TransferFailed.CAUSE_RECEIVER, False
