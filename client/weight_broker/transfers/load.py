"""`acquire_or_load`: weights from a peer if there is one, from disk if not, and then a source for the next instance."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from weight_broker.errors import BrokerError, BrokerUnavailable, LayoutMismatch
from weight_broker.key import WeightSetKey
from weight_broker.transfers.lease import ColdLoadLease
from weight_broker.transfers.publication import Publication
from weight_broker.transfers.report import LoadReport

if TYPE_CHECKING:
    from weight_broker.client import BrokerClient
    from weight_broker.memory.shared import Shared
    from weight_broker.transfers.report import AcquireReport

TensorSource = Mapping[str, object] | Callable[[], Mapping[str, object]]
"""Tensors by name, or a function that returns them: for loaders that replace tensors while they load."""

# No descriptor, memory or thread left: for sockets, for modules that are imported only now, for gRPC.
_SHORTAGES = (OSError, MemoryError, ImportError, RuntimeError)

_logger = logging.getLogger("weight_broker")


def acquire_or_load(
    client: BrokerClient,
    key: WeightSetKey,
    tensors: TensorSource,
    load: Callable[[], None],
    *,
    timeout: float,
    publish: bool,
) -> LoadReport:
    """See `BrokerClient.acquire_or_load`."""
    begun = time.monotonic()
    lease: ColdLoadLease | None = None
    acquire_error: Exception | None = None
    wanted = current(tensors)
    try:
        if publish:
            outcome = client._acquire_and_share(key, wanted, timeout=timeout)
            if not isinstance(outcome, ColdLoadLease):
                if outcome.shared is None:
                    raise AssertionError("what was received was to be kept")
                return _from_peer(client, key, outcome.report, outcome.shared, begun)
            lease = outcome
            prepare_memory(lease, wanted)
        else:  # who does not publish must not hold the lease that others wait for
            report = client.acquire(key, wanted, timeout=timeout)
            seconds = time.monotonic() - begun
            return LoadReport("peer", seconds, seconds, report=report)
    except BrokerError as error:
        if not error.quiesced:
            raise  # somebody may still write to the tensors: nothing may be loaded into them
        _logger.warning("loading %s from disk: %s", key.model, error)
        acquire_error = error
    except _SHORTAGES as error:  # of this process: the disk may well do without
        _logger.warning("loading %s from disk: %r", key.model, error, exc_info=not _expected(error))
        acquire_error = error
    del wanted
    acquired = time.monotonic()
    _load(load, lease)
    loaded = time.monotonic()
    publication, publish_error = None, None
    if publish and not isinstance(acquire_error, BrokerUnavailable):
        if isinstance(acquire_error, LayoutMismatch):
            _logger.warning("publishing %s with another layout than the resident one", key.model)
        publication, publish_error = _publish(client, key, tensors, lease)
    ended = time.monotonic()
    return LoadReport(
        "disk",
        ended - begun,
        acquired - begun,
        loaded - acquired,
        ended - loaded,
        publication=publication,
        acquire_error=_text(acquire_error),
        publish_error=publish_error,
    )


def current(tensors: TensorSource) -> Mapping[str, object]:
    """The tensors as they are now."""
    return tensors() if callable(tensors) else tensors


def _from_peer(
    client: BrokerClient, key: WeightSetKey, report: AcquireReport, shared: Shared, begun: float
) -> LoadReport:
    """The weights came from a peer. What was read is sealed, so it is published as it is: nothing is copied."""
    acquired = time.monotonic()
    publication, publish_error = _attempt(key, lambda: client._publish_shared(key, shared))
    ended = time.monotonic()
    return LoadReport(
        "peer",
        ended - begun,
        acquired - begun,
        publish_seconds=ended - acquired,
        report=report,
        publication=publication,
        publish_error=publish_error,
    )


def prepare_memory(lease: ColdLoadLease, tensors: Mapping[str, object]) -> None:
    """Has the kernel give out memory for publishing `tensors` while they are loaded, if they are in host memory."""
    from weight_broker.memory.host.export import region_bytes
    from weight_broker.memory.tensors import describe

    with contextlib.suppress(BrokerError):  # what cannot be shared: publishing says so
        described = describe(tensors)
        if described.device_kind == "cpu":
            lease.prepare_memory(region_bytes(described.layout))


def _load(load: Callable[[], None], lease: ColdLoadLease | None) -> None:
    """Loads from disk. If that fails the lease is given up at once, so that another instance can try."""
    try:
        load()
    except BaseException as error:
        if lease is not None:
            _give_up(lease, f"the loader raised {type(error).__name__}")
        raise


def _publish(
    client: BrokerClient, key: WeightSetKey, tensors: TensorSource, lease: ColdLoadLease | None
) -> tuple[Publication | None, str | None]:
    publication, publish_error = _attempt(key, lambda: client.publish(key, current(tensors), lease=lease))
    if publication is None and lease is not None:
        _give_up(lease, f"publishing failed: {publish_error}")
    return publication, publish_error


def _attempt(key: WeightSetKey, publish: Callable[[], Publication]) -> tuple[Publication | None, str | None]:
    try:
        return publish(), None
    except Exception as error:  # the weights are loaded: whatever goes wrong now must not undo that
        _logger.warning("%s is loaded but not published: %s", key.model, error, exc_info=not _expected(error))
        return None, _text(error)


def _give_up(lease: ColdLoadLease, reason: str) -> None:
    try:
        lease.give_up(reason)
    except BrokerError as error:
        _logger.warning("%r could not be given up: %s", lease, error)


def _expected(error: Exception) -> bool:
    return isinstance(error, BrokerError | OSError | MemoryError)


def _text(error: Exception | None) -> str | None:
    """What is kept of an error: not the object, whose traceback would keep the tensors alive."""
    return None if error is None else f"{type(error).__name__}: {error}"
