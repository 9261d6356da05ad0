"""One load of one weight set: from a peer if there is one, from disk if not, and then a source for the next instance.

Every caller takes the same steps: `fill` or `map`; without success it reads from disk; `publish`. The callers are
`BrokerClient.acquire_or_load` and the integrations.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from weight_broker.drivers.error import DriverError
from weight_broker.errors import BrokerError, BrokerUnavailable, LayoutMismatch, PublishRefused
from weight_broker.memory.kind import DeadlinePassed, kind_of
from weight_broker.transfers.checked import Check, WeightsDamaged
from weight_broker.transfers.exchange import Exchange, Filled, Framework, IfAbsent, Mapped, Request, checked_seconds
from weight_broker.transfers.lease import ColdLoadLease
from weight_broker.transfers.report import AcquireReport, LoadReport
from weight_broker.transfers.written import TensorSource, Watch, current

if TYPE_CHECKING:
    from weight_broker.key import WeightSetKey
    from weight_broker.load_group import LoadGroup
    from weight_broker.memory.kind import Shared
    from weight_broker.transfers.publication import Publication
    from weight_broker.transfers.report import AttachedTensors

SURVIVABLE = (BrokerError, DriverError, DeadlinePassed, OSError, MemoryError, ImportError, RuntimeError)
"""Failures that end in a load from disk: the broker or a driver refused, or this process has no descriptor, memory or
thread left (for sockets, late imports, gRPC), which the disk may not need."""

_EXPECTED = (BrokerError, DriverError, OSError, MemoryError)
Outcome = TypeVar("Outcome", Filled, Mapped)
_logger = logging.getLogger("weight_broker")


class Load:
    """A context manager: at its end, a lease or shared memory that is left is given back.

    With `publish` the broker may grant this process the lease, and all others wait for its load. `wait`: whether to
    wait for another process's load. `timeout`: seconds for the acquisition, from the beginning of the load. `strict`:
    `fill` and `map` raise the failures that they would survive.
    """

    touched = False
    """Whether a source failed half way: the content of the tensors is undefined."""
    failure: type[Exception] | None = None
    """The error that kept the weights from coming from a peer. Only its type: a traceback would keep the tensors
    alive."""

    def __init__(
        self,
        exchange: Exchange,
        key: WeightSetKey,
        *,
        timeout: float,
        publish: bool,
        wait: bool = True,
        group: LoadGroup | None = None,
        strict: bool = False,
        logger: logging.Logger = _logger,
    ) -> None:
        self._exchange = exchange
        self._key = key
        self._timeout = timeout
        self._publish = publish
        self._if_absent: IfAbsent = ("load" if publish else "wait") if wait else "fail"
        self._group = group
        self._strict = strict
        self._logger = logger
        self._lease: ColdLoadLease | None = None
        self._shared: Shared | None = None
        self._acquired: AcquireReport | None = None
        self._acquire_error: str | None = None
        self._publication: Publication | None = None
        self._publish_error: str | None = None
        self._check: Check | None = None
        self._watch: Watch | None = None
        self._begun = time.monotonic()
        self._acquire_ended = self._publish_begun = self._ended = 0.0

    def fill(self, tensors: TensorSource) -> bool:
        """True: filled from a peer. False: load from disk. Raises only a `BrokerError` with `quiesced` False: the
        storages of the tensors must be discarded."""
        present: Mapping[str, object] = {}

        def filled(request: Request) -> Filled | ColdLoadLease:
            nonlocal present
            present = current(tensors)
            return self._exchange.fill(request, present)

        outcome = self._attempt(filled)
        if self._lease is not None:
            self._prepare_for(present)
        if outcome is None:
            return False
        self._acquired, self._shared = outcome.report, outcome.shared
        return True

    def map(self, framework: Framework, like: Mapping[str, object] | None = None) -> AttachedTensors | None:
        """Views of the resident memory, which must have the layout of the tensors `like`. None: load from disk, or
        `fill`."""

        def mapped(request: Request) -> Mapped | ColdLoadLease:
            outcome = self._exchange.map(request, framework)
            if isinstance(outcome, Mapped) and like is not None:
                _check_layout(outcome, like)
            return outcome

        outcome = self._attempt(mapped)
        if self._lease is not None and like is not None:
            self._prepare_for(like)
        if outcome is None:
            return None
        self._acquired, self._shared = outcome.tensors.report, outcome.shared
        return outcome.tensors

    @property
    def has_lease(self) -> bool:
        """Whether all others wait for this process's load from disk."""
        return self._lease is not None

    @property
    def holds_copy(self) -> bool:
        """Whether the weights arrived from a copy in host memory, which `publish` shares again."""
        return self._shared is not None and not self._shared.needs_retraction

    def prepare_memory(self, size_bytes: int) -> None:
        """Allocate memory for publishing while the weights are read. Does nothing without a lease."""
        if self._lease is not None and size_bytes > 0:
            with contextlib.suppress(*SURVIVABLE):
                self._lease.prepare_memory(size_bytes)

    def watch(self, tensors: TensorSource) -> None:
        """Called before weights are read from disk: `publish` then refuses what that did not write."""
        if self._is_publishing:
            try:
                self._watch = Watch(tensors, touched=self.touched)
            except SURVIVABLE as error:
                self._refuse(error, "%s will not be published: %s")

    def publish(
        self, tensors: TensorSource, check: Check | None = None, *, in_host_memory: bool = False
    ) -> Publication | None:
        """Publish, unless publishing is off or there is no broker; what was read from disk only once `check` has found
        nothing; `in_host_memory` as a copy there. Never raises, as the weights are loaded; the report says why there is
        no publication."""
        self._publish_begun, self._check = time.monotonic(), check
        if self._is_publishing:
            try:
                self._publication = self._offer(tensors, in_host_memory)
            except Exception as error:  # noqa: BLE001  # the weights are loaded: no failure may undo that
                self._refuse(error, "%s is loaded but not published: %s")
        self._ended = time.monotonic()
        return self._publication

    @property
    def _is_publishing(self) -> bool:
        is_hopeless = issubclass(self.failure or type(None), BrokerUnavailable)
        return self._publish and not is_hopeless and self._publish_error is None

    def _refuse(self, error: Exception, text: str) -> None:
        self._publish_error = _text(error)
        self._logger.warning(text, self._key.model, error, exc_info=not isinstance(error, _EXPECTED))
        self.give_up(f"publishing failed: {self._publish_error}", unpublishable=isinstance(error, WeightsDamaged))

    def give_up(self, reason: str, *, unpublishable: bool = False) -> None:
        """End the lease, if there is one: the next waiter gets it; if the weights are `unpublishable`, all waiters load
        from disk. Never raises."""
        lease, self._lease = self._lease, None
        if lease is None:
            return
        try:
            lease.give_up(reason, unpublishable=unpublishable)
        except SURVIVABLE as error:
            self._logger.warning("%r could not be given up; it ends at its time limit: %s", lease, error)

    @property
    def report(self) -> LoadReport:
        ended = self._ended or time.monotonic()
        acquire_ended = self._acquire_ended or self._begun
        publish_begun = self._publish_begun or ended
        is_peer = self._acquired is not None
        return LoadReport(
            "peer" if is_peer else "disk",
            ended - self._begun,
            acquire_ended - self._begun,
            0.0 if is_peer else publish_begun - acquire_ended,
            ended - publish_begun,
            report=self._acquired,
            publication=self._publication,
            acquire_error=self._acquire_error,
            publish_error=self._publish_error,
        )

    def close(self, reason: str = "nothing was published") -> None:
        """Give back the lease and the shared memory. Idempotent."""
        self.give_up(reason)
        self._ended = self._ended or time.monotonic()
        self._release()

    def _release(self) -> None:
        """Give back the memory that arrived."""
        shared, self._shared = self._shared, None
        if shared is not None:
            try:
                shared.close()
            except SURVIVABLE as error:
                self._exchange.leave(shared)
                self._logger.warning("the memory of %s is still shared: %s", self._key.model, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close("nothing was published" if kind is None else f"the loader raised {kind.__name__}")

    def _attempt(self, ask: Callable[[Request], Outcome | ColdLoadLease]) -> Outcome | None:
        """One acquisition. None: there is a lease, or a failure that the load survives."""
        self.failure = None
        try:
            outcome = ask(self._request())
        except SURVIVABLE as error:
            if self._strict or not getattr(error, "quiesced", True):
                raise  # a transfer may still write to the tensors: loading into them is not safe
            self.touched = self.touched or bool(getattr(error, "touched", False))
            self.failure, self._acquire_error = type(error), _text(error)
            shown = error if isinstance(error, BrokerError) else repr(error)
            is_defect = not isinstance(error, _EXPECTED)
            self._logger.warning("loading %s from disk: %s", self._key.model, shown, exc_info=is_defect)
            return None
        finally:
            self._acquire_ended = time.monotonic()
        if not isinstance(outcome, ColdLoadLease):
            self._acquire_error = None
            return outcome
        self._lease = outcome
        self._acquire_error = outcome.failure or self._acquire_error
        self.touched = self.touched or outcome.touched
        return None

    def _request(self) -> Request:
        elapsed = time.monotonic() - self._begun
        timeout = max(checked_seconds("timeout", self._timeout) - elapsed, 0.001)
        return Request(self._key, timeout, self._if_absent, self._group, keep=self._publish)

    def _prepare_for(self, tensors: Mapping[str, object]) -> None:
        from weight_broker.memory.tensors import describe

        with contextlib.suppress(*SURVIVABLE):  # publishing reports tensors that cannot be shared
            described = describe(tensors)
            self.prepare_memory(kind_of(described.device_kind).prepared_bytes(described.layout))

    def _offer(self, tensors: TensorSource, in_host_memory: bool) -> Publication:
        if in_host_memory and not self.holds_copy:
            self._release()
        shared, self._shared = self._shared, None
        if shared is not None:  # verified on arrival: nothing needs to be copied
            return self._exchange.publish_shared(self._key, shared, group=self._group)
        present = current(tensors)
        why = self._watch.refusal(present) if self._watch is not None else ""
        if why:  # in every instance: they run the same load
            self.give_up(why, unpublishable=True)
            raise PublishRefused(why)
        if issubclass(self.failure or type(None), LayoutMismatch):
            self._logger.warning("publishing %s with another layout than the resident one", self._key.model)
        publication = self._exchange.publish(
            self._key,
            present,
            lease=self._lease,
            group=self._group,
            check=self._check,
            in_host_memory=in_host_memory,
        )
        self._lease = None
        return publication


def _check_layout(mapped: Mapped, like: Mapping[str, object]) -> None:
    """Raises `LayoutMismatch`, with the memory closed."""
    from weight_broker.layout import differences
    from weight_broker.memory.tensors import describe

    try:
        wanted, resident = describe(like).layout, mapped.tensors.layout
        if resident.fingerprint != wanted.fingerprint:
            text = "; ".join(differences(resident, wanted))
            raise LayoutMismatch(f"the resident weights have another layout: {text}", metadata={"differences": text})
    except BaseException:
        if mapped.shared is not None:
            mapped.shared.close()
        raise


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
