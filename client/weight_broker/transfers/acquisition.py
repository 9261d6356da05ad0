"""One acquire call on one session: read the stream, take the bytes from each granted source, say how it went."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import grpc

from weight_broker.connection.channel import decode_error
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
from weight_broker.transfers.report import AcquireReport
from weight_broker.v1 import resources_pb2
from weight_broker.v1 import weight_broker_service_pb2 as pb
from weight_broker.wire import key_to_wire, layout_to_wire, load_group_to_wire

IF_ABSENT = {"fail": pb.IF_ABSENT_FAIL, "wait": pb.IF_ABSENT_WAIT, "load": pb.IF_ABSENT_LOAD}
"""What to do if nobody holds the weight set."""

_LAST_WORD_SECONDS = 1.0
_PHASE_NAMES = {value: name for name, value in calls.PHASES.items()}
_DATA_PLANES = {resources_pb2.DATA_PLANE_LOCAL: "local", resources_pb2.DATA_PLANE_DATASYSTEM: "datasystem"}
_PATHS = {
    resources_pb2.TRANSFER_PATH_COPY: "copy",
    resources_pb2.TRANSFER_PATH_ZERO_COPY: "zero_copy",
    resources_pb2.TRANSFER_PATH_STAGED: "staged",
}

# With every byte in place and verified, these say something about the broker, not about the weights.
_BROKER_GONE = (Reason.BROKER_UNAVAILABLE, Reason.NOT_ATTACHED, Reason.ACQUIRE_TIMEOUT, Reason.INTERNAL)

_logger = logging.getLogger("weight_broker")


@dataclass(slots=True)
class Acquired:
    """The weights are in place."""

    report: AcquireReport
    received: Received


@dataclass(frozen=True, slots=True)
class ColdLoadTold:
    """This process is to load from disk."""

    lease: resources_pb2.ColdLoadLease
    touched: bool


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
    """Seconds by phase; what the caller did before is in it already."""
    group: LoadGroup | None = None
    """The engine that this process is a rank of."""
    _touched: bool = False
    _last_failure: BrokerError | None = None
    _granted: pb.Granted | None = None
    _received: Received | None = None
    _mark: float = field(default_factory=time.monotonic)
    _waiting: bool = False
    _own_lease: bool = False
    """Whether the lease that is waited for is this very session's."""
    _is_filled: bool = False
    """Whether the broker may write to this process's memory now."""

    def run(self) -> Acquired | ColdLoadTold:
        """Returns with every byte in place and verified or with the lease; raises a `BrokerError` otherwise. On any
        exception the stream is cancelled, which frees the source's reader slot. The destination stays the caller's."""
        self._mark = time.monotonic()
        stub, metadata = self.session.stub, self.session.metadata
        stream = None
        try:
            request = self._request()
            timeout = self._remaining() + self.destination.grace_seconds
            stream = stub.Acquire(request, timeout=timeout, metadata=metadata)
            return self._follow(stream)
        finally:
            try:
                if self._is_filled:  # an interruption: whoever caught it would use the memory
                    self._stop_filling()
            finally:
                if stream is not None:
                    stream.cancel()

    def _follow(self, stream: Iterator[pb.AcquireResponse]) -> Acquired | ColdLoadTold:
        try:
            for response in stream:
                match response.WhichOneof("event"):
                    case "waiting":
                        self._end_wait()
                        self._waiting = True
                        self._note_holder(response.waiting)
                    case "granted":
                        self._end_wait()
                        self._waiting = self._own_lease = False
                        unheard = self._transfer(response.granted)
                        if unheard is not None:
                            return self._without_answer(unheard)
                    case "moved":
                        unheard = self._verify(response.moved)
                        if unheard is not None:
                            return self._without_answer(unheard)
                    case "done":
                        self._pass("confirm")
                        return self._finished(response.done.report)
                    case "cold_load":
                        self._end_wait()
                        lease = response.cold_load.cold_load_lease
                        # Only now that nobody writes any more is this told; a source that was lost may have written.
                        self._touched, self._is_filled = self._touched or self._is_filled, False
                        self._confirm_lease(stream, lease)
                        return ColdLoadTold(lease, self._touched)
                    case _:  # progress of a transfer that the broker carries out, or news of a newer broker
                        pass
        except grpc.RpcError as error:
            filled, self._is_filled = self._is_filled, False
            return self._without_answer(
                decode_error(
                    error,
                    on_deadline=Reason.ACQUIRE_TIMEOUT,
                    touched=self._touched,
                    broker_writes=filled,
                )
            )
        return self._without_answer(BrokerError("the broker ended the acquisition without an answer"))

    def _confirm_lease(self, stream: Iterator[pb.AcquireResponse], lease: resources_pb2.ColdLoadLease) -> None:
        """Reads to the end of the stream: it tells the broker an answer that arrived from a call that was cancelled.
        If that fails this process does not load, and so the next one is to be told."""
        try:
            for _ in stream:
                pass
        except BaseException:
            with contextlib.suppress(BrokerError):  # most likely the broker has ended the lease with the call
                calls.give_up_lease(
                    self.session, lease.weight_set_id, lease.fencing_token, "unheard", timeout=_LAST_WORD_SECONDS
                )
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
            request.assembly_timeout.FromNanoseconds(int(min(self.group.assembly_timeout, self._remaining()) * 1e9))
        self.destination.fill_request(request, self.session)
        if self.destination.grace_seconds:
            request.timeout.FromNanoseconds(int(self._remaining() * 1e9))
        return request

    def _transfer(self, granted: pb.Granted) -> BrokerError | None:
        """Takes the bytes from one source and reports how it went, unless the broker brings them: then `moved` follows.
        Returns why the report was not heard, if so."""
        self._granted, self._received = granted, None
        return self._report(granted, lambda: self.destination.take(granted, self._claim, self.deadline))

    def _verify(self, moved: pb.Moved) -> BrokerError | None:
        """The broker has brought the bytes and writes no more."""
        granted = self._granted
        if granted is None or not self._is_filled:
            raise BrokerError("the broker moved what was never granted", touched=self._touched)
        self._is_filled = False
        self._touched = True
        for phase_time in moved.phase_times:
            name = _PHASE_NAMES.get(phase_time.phase)
            if name is not None:
                self._add(name, phase_time.duration.ToNanoseconds() / 1e9)
        return self._report(granted, lambda: self.destination.verify(granted, moved, self.deadline))

    def _report(self, granted: pb.Granted, take: Callable[[], Received | None]) -> BrokerError | None:
        """Tells the broker what became of a transfer. A failure that another source may cure is kept in mind: the
        broker's next word decides. Any other is raised."""
        try:
            received = take()
        except (NotAttached, BrokerUnavailable) as error:
            error.touched = self._touched
            raise
        except BrokerError as error:
            self._touched = self._touched or error.touched
            cause, is_curable = _blame(error)
            unheard = self._fail(cause, error)
            if is_curable:
                return unheard
            raise
        if received is None:
            self._is_filled = True
            return None
        self._received = received
        self._touched = self._touched or received.touched
        for name, seconds in received.seconds.items():
            self._add(name, seconds)
        self._mark = time.monotonic()
        return self._tell(
            lambda: calls.report_success(
                self.session,
                granted.transfer_id,
                size_bytes=received.size_bytes,
                phases=self.phases,
                verified=received.verified,
            )
        )

    def _stop_filling(self) -> None:
        """Returns when the broker writes no more, if it can be told."""
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
            _logger.error("the broker may still write to the tensors: %s", error)

    def _claim(self, index: int) -> int:
        """Opens a region of the source that was granted last."""
        if self._granted is None:
            raise AssertionError("nothing is granted")
        try:
            return self.session.connection.claim_region(self._granted.transfer_id, index)
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
        timeout = min(max(self._remaining(), _LAST_WORD_SECONDS), calls.REPORT_TIMEOUT_SECONDS)
        unheard = self._tell(
            lambda: calls.report_failure(self.session, granted.transfer_id, cause=cause, detail=detail, timeout=timeout)
        )
        self._mark = time.monotonic()
        return unheard

    def _tell(self, report: Callable[[], None]) -> BrokerError | None:
        """Makes a report. Returns why the broker did not take it, unless it has ended the transfer on its own: then the
        stream says how."""
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
        # A rank of an engine is not done before the others are, and whether they are is the broker's to say.
        if self._received is not None and self.group is None and error.reason in _BROKER_GONE:
            _logger.warning("every byte is in place and verified, but the broker did not confirm it: %s", error)
            return self._finished(None)
        error.touched = error.touched or self._touched
        if self._own_lease and error.reason is Reason.ACQUIRE_TIMEOUT:
            error = AcquireTimeout(
                f"{error.message}; it waited for a cold-load lease that this very process holds: publish with it, or "
                "give it up, before asking again",
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
            raise BrokerError("the broker called an acquisition done that moved nothing", touched=self._touched)
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
    """The cause that is reported, and whether another source may cure it."""
    if isinstance(error, IntegrityError):
        return pb.TransferFailed.CAUSE_DIGEST_MISMATCH, True
    if isinstance(error, TransferFailed) and not error.touched:  # the source's memory is not what it should be
        return pb.TransferFailed.CAUSE_SOURCE_UNREACHABLE, True
    return pb.TransferFailed.CAUSE_RECEIVER, False
