"""The public client: fill this process's tensors from a peer, and offer them to others."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from weight_broker.connection.session import Attachment
from weight_broker.errors import BrokerError, InvalidArgument, PublishRefused
from weight_broker.key import WeightSetKey
from weight_broker.memory.device.path import DevicePath, may_stage
from weight_broker.memory.device.path import device_path as device_path_of
from weight_broker.memory.digest_mode import DigestMode
from weight_broker.memory.shared import Shared, SharedWeights
from weight_broker.transfers import load as loading
from weight_broker.transfers.lease import ColdLoadLease
from weight_broker.transfers.publication import Publication, publications_of
from weight_broker.transfers.report import AcquireReport, AttachedTensors, LoadReport

if TYPE_CHECKING:
    from weight_broker.connection.session import Session
    from weight_broker.load_group import LoadGroup
    from weight_broker.memory.device.destination import DeviceDestination
    from weight_broker.memory.host.destination import Receiver
    from weight_broker.memory.tensors import DescribedTensors
    from weight_broker.transfers.acquisition import Acquired

MAX_TIMEOUT_SECONDS = 7 * 24 * 3600.0
_PUBLISH_TIMEOUT_SECONDS = 60.0
Framework = Literal["torch", "numpy"]
IfAbsent = Literal["fail", "wait", "load"]
"""What to do if nobody holds the weight set."""
_logger = logging.getLogger("weight_broker")


class BrokerClient:
    """This process's way to its host's broker.

    Creating one does nothing but remember its arguments. The first call attaches to the broker; one session is then
    used by all threads. A forked child has to itself a client in the state of a new one: what the parent has published
    stays the parent's.

    `runtime_directory` is where the broker's sockets are (None: the usual places); `name` is shown to people;
    `connect_timeout` bounds the time, in seconds, that an unresponsive broker can cost; `digest_mode` says how much of
    the content is verified: "full", "sampled", or "auto" for full where that is cheap; `device_path` how device memory
    is read and filled: "direct" where it is, "staged" through a bucket of the broker's, "auto" for direct where that is
    possible (None: WEIGHT_BROKER_DEVICE_PATH, or "auto").
    """

    def __init__(
        self,
        runtime_directory: str | Path | None = None,
        *,
        name: str = "",
        connect_timeout: float = 2.0,
        digest_mode: str = "auto",
        device_path: str | None = None,
    ) -> None:
        if digest_mode not in list(DigestMode):
            raise InvalidArgument("digest_mode", digest_mode, "'auto', 'full' or 'sampled'")
        directory = Path(runtime_directory) if runtime_directory is not None else None
        self._attachment = Attachment(directory, name, _checked_seconds("connect_timeout", connect_timeout))
        self._digest_mode = DigestMode(digest_mode)
        self._device_path = device_path_of(device_path)

    def acquire(
        self,
        key: WeightSetKey,
        tensors: Mapping[str, object],
        *,
        timeout: float = 300.0,
        wait: bool = True,
        group: LoadGroup | None = None,
    ) -> AcquireReport:
        """Fills `tensors` from a source: returns with every byte written and verified, or raises a `BrokerError` that
        says whether they were touched.

        If nobody holds the weight set: `WeightsNotFound`, at once unless somebody is loading it and `wait` is True.
        `timeout` is in seconds and bounds the whole call. `group` is the engine that this process is a rank of: its
        ranks are all filled from the ranks of one other engine, or none is.
        """
        acquired = self._fill(key, tensors, timeout, "wait" if wait else "fail", keep_shared=False, group=group)
        if isinstance(acquired, ColdLoadLease):
            raise BrokerError("the broker granted a cold-load lease that was not asked for", touched=acquired.touched)
        return acquired.report

    def acquire_or_lease(
        self,
        key: WeightSetKey,
        tensors: Mapping[str, object],
        *,
        timeout: float = 300.0,
        group: LoadGroup | None = None,
    ) -> AcquireReport | ColdLoadLease:
        """Like `acquire`, but if nobody holds the weight set, one process of all is told to load it: it gets the
        lease, loads, and calls `publish` with it (or `give_up` on it). All others wait for that. Use the lease as a
        context manager: if the block ends without either, it is given up."""
        acquired = self._fill(key, tensors, timeout, "load", keep_shared=False, group=group)
        return acquired if isinstance(acquired, ColdLoadLease) else acquired.report

    def acquire_or_load(
        self,
        key: WeightSetKey,
        tensors: loading.TensorSource,
        load: Callable[[], None],
        *,
        timeout: float = 300.0,
        publish: bool = True,
    ) -> LoadReport:
        """Fills `tensors` from a peer, or calls `load`, which loads them from disk, and then offers them to others.

        `tensors` is a mapping, or a function that returns one, which is called again after `load`. `load` is called
        at most once, and its exceptions pass through unchanged. No failure of the broker, and no failure to publish, is
        raised; both are logged and stand in the report. The one exception: an error with `quiesced` False, after which
        the tensors' storages must be discarded.
        """
        return loading.acquire_or_load(self, key, tensors, load, timeout=timeout, publish=publish)

    def attach_tensors(
        self,
        key: WeightSetKey,
        *,
        framework: Framework = "torch",
        timeout: float = 300.0,
        wait: bool = True,
    ) -> AttachedTensors:
        """Tensors (of `framework` "torch" or "numpy") that are copy-on-write views of the resident memory: takes
        milliseconds, whatever the size, and no memory until something is written. A sample of each is verified
        (with digest mode "full", everything): the memory is sealed since it was published."""
        attached = self._attach(key, framework, timeout, "wait" if wait else "fail", keep_shared=False)
        if isinstance(attached, ColdLoadLease):
            raise BrokerError("the broker granted a cold-load lease that was not asked for")
        return attached[0]

    def _attach_and_share(
        self,
        key: WeightSetKey,
        *,
        framework: Framework = "torch",
        timeout: float = 300.0,
        if_absent: IfAbsent = "load",
        group: LoadGroup | None = None,
    ) -> tuple[AttachedTensors, SharedWeights] | ColdLoadLease:
        """Like `attach_tensors`, but if nobody holds the weight set, one process of all is told to load it, as by
        `acquire_or_lease`. The memory stays open besides, for `_publish_shared`."""
        return self._attach(key, framework, timeout, if_absent, keep_shared=True, group=group)

    def publish(
        self,
        key: WeightSetKey,
        tensors: Mapping[str, object],
        *,
        lease: ColdLoadLease | None = None,
        group: LoadGroup | None = None,
        timeout: float = _PUBLISH_TIMEOUT_SECONDS,
    ) -> Publication:
        """Offers `tensors` as a source for others. Host memory is copied once: it may be changed and freed afterwards.
        Device memory is shared where it is: it must not change, move or be freed before `Publication.retract`.

        `lease` is the cold-load lease that this fulfils; `group` the engine that this process is a rank of: what its
        ranks publish is read together. `PublishRefused`: the message says why and what to do.
        """
        from weight_broker.memory.device.destination import is_on_device, share
        from weight_broker.memory.host.export import export
        from weight_broker.memory.tensors import describe

        deadline = time.monotonic() + _checked_seconds("timeout", timeout)
        _check_key(key)
        described = describe(tensors)
        self._attachment.session()  # without a broker there is no point in copying
        if is_on_device(described):
            shared_device = share(described, deadline, self._device_path)
            return self._publish_shared(key, shared_device, timeout=_left(deadline), lease=lease, group=group)
        prepared = lease.prepared if lease is not None else None
        region = export(described, digest_mode=self._digest_mode, deadline=deadline, prepared=prepared)
        shared = SharedWeights(
            described.layout,
            [(region.fd, region.size_bytes)],
            region.placements,
            region.digests,
        )
        return self._publish_shared(key, shared, timeout=_left(deadline), lease=lease, group=group)

    def _publish_shared(
        self,
        key: WeightSetKey,
        shared: Shared,
        *,
        timeout: float = _PUBLISH_TIMEOUT_SECONDS,
        lease: ColdLoadLease | None = None,
        group: LoadGroup | None = None,
    ) -> Publication:
        """Offers memory that is shared already, and takes it over (closes it if the publication fails). For the
        package's own loaders, like the other two that share memory."""
        from weight_broker.memory.device.destination import DeviceShared
        from weight_broker.memory.device.staged import StagedShared

        deadline = time.monotonic() + timeout
        fencing_token = lease.fencing_token if lease is not None else 0
        described = shared.described if isinstance(shared, DeviceShared) else None
        publication = Publication(self._attachment, key, shared, owner=self, group=group)
        try:
            publication.announce(deadline=deadline, fencing_token=fencing_token)
        except PublishRefused as error:
            if described is None or not self._may_stage(described, error):
                raise
            staged = StagedShared(described, shared.digests)
            publication = Publication(self._attachment, key, staged, owner=self, group=group)
            publication.announce(deadline=deadline, fencing_token=fencing_token)
        if lease is not None:
            lease.fulfilled()
        return publication

    def _acquire_and_share(
        self,
        key: WeightSetKey,
        tensors: Mapping[str, object],
        *,
        timeout: float,
        if_absent: IfAbsent = "load",
        group: LoadGroup | None = None,
    ) -> Acquired | ColdLoadLease:
        """Like `acquire_or_lease`, but the source's memory stays open in `shared`, for `_publish_shared`."""
        return self._fill(key, tensors, timeout, if_absent, keep_shared=True, group=group)

    def close(self) -> None:
        """Retracts everything that was published through this client and leaves the broker. Idempotent; safe in a
        forked child, where it ends nothing of the parent's. `RetractTimeout`: device memory is still read and must not
        be freed; call again."""
        publications = publications_of(self._attachment)
        for publication in publications:
            if publication.needs_retraction:
                publication.retract()
        self._attachment.end()
        for publication in publications:
            publication.abandon()

    def __enter__(self) -> BrokerClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _attach(
        self,
        key: WeightSetKey,
        framework: Framework,
        timeout: float,
        if_absent: IfAbsent,
        *,
        keep_shared: bool,
        group: LoadGroup | None = None,
    ) -> tuple[AttachedTensors, SharedWeights] | ColdLoadLease:
        begun = time.monotonic()
        if framework not in ("torch", "numpy"):
            raise InvalidArgument("framework", framework, "'torch' or 'numpy'")

        def mapper() -> Receiver:
            from weight_broker.memory.host.destination import TensorMapper

            return TensorMapper(framework, self._digest_mode)

        acquired = self._acquire(key, mapper, timeout, if_absent, begun, {}, keep_shared=keep_shared, group=group)
        if isinstance(acquired, ColdLoadLease):
            return acquired
        shared = acquired.shared
        if not isinstance(shared, SharedWeights):
            raise AssertionError("what was mapped is not host memory")
        return AttachedTensors(acquired.received.tensors, shared.layout, acquired.report), shared

    def _fill(
        self,
        key: WeightSetKey,
        tensors: Mapping[str, object],
        timeout: float,
        if_absent: IfAbsent,
        *,
        keep_shared: bool,
        group: LoadGroup | None = None,
    ) -> Acquired | ColdLoadLease:
        from weight_broker.memory.device.destination import is_on_device
        from weight_broker.memory.tensors import describe

        begun = time.monotonic()
        described = describe(tensors)
        described.require_writable()
        phases = {"describe": time.monotonic() - begun}
        if is_on_device(described):

            def fill(destination: DeviceDestination) -> Acquired | ColdLoadLease:
                try:
                    acquired = self._acquire(
                        key,
                        lambda: destination,
                        timeout,
                        if_absent,
                        begun,
                        phases,
                        keep_shared=keep_shared,
                        group=group,
                    )
                except BaseException as error:
                    _close_after(destination, error)
                    raise
                destination.close()
                return acquired

            return self._fill_device(described, fill)

        def filler() -> Receiver:
            from weight_broker.memory.host.destination import TensorFiller

            return TensorFiller(described, self._digest_mode)

        return self._acquire(key, filler, timeout, if_absent, begun, phases, keep_shared=keep_shared, group=group)

    def _fill_device(
        self, described: DescribedTensors, fill: Callable[[DeviceDestination], Acquired | ColdLoadLease]
    ) -> Acquired | ColdLoadLease:
        """Fills the tensors where they are, or through a bucket."""
        from weight_broker.memory.device.destination import DeviceDestination
        from weight_broker.memory.device.staged import StagedDestination

        touched = False
        if self._device_path is not DevicePath.STAGED:
            try:
                return fill(DeviceDestination(described))
            except BrokerError as error:
                if not self._may_stage(described, error):
                    raise
                touched = error.touched
        try:
            return fill(StagedDestination(described))
        except BrokerError as error:
            error.touched = error.touched or touched
            raise

    def _may_stage(self, described: DescribedTensors, error: BrokerError) -> bool:
        """Whether what failed is to be tried through a bucket."""
        if self._device_path is not DevicePath.AUTO or not may_stage(described.device_kind, error):
            return False
        _logger.warning("the tensors go through a bucket of the broker's: %s", error)
        return True

    def _acquire(
        self,
        key: WeightSetKey,
        make_receiver: Callable[[], Receiver | DeviceDestination],
        timeout: float,
        if_absent: IfAbsent,
        begun: float,
        phases: dict[str, float],
        *,
        keep_shared: bool,
        group: LoadGroup | None = None,
    ) -> Acquired | ColdLoadLease:
        _check_key(key)
        deadline = begun + _checked_seconds("timeout", timeout)

        def acquire(session: Session) -> Acquired | ColdLoadLease:
            from weight_broker.transfers.acquisition import IF_ABSENT, Acquisition, ColdLoadTold

            phases["attach"] = time.monotonic() - begun - phases.get("describe", 0.0)
            outcome = Acquisition(
                session, key, make_receiver(), IF_ABSENT[if_absent], deadline, begun, dict(phases), keep_shared, group
            ).run()
            if isinstance(outcome, ColdLoadTold):
                lease = outcome.lease
                return ColdLoadLease(
                    self._attachment,
                    session,
                    weight_set_id=lease.weight_set_id,
                    fencing_token=lease.fencing_token,
                    expires_at=lease.expire_time.ToNanoseconds() / 1e9,
                    touched=outcome.touched,
                )
            return outcome

        return self._attachment.run(acquire)


def _close_after(destination: DeviceDestination, error: BaseException) -> None:
    """The broker's word is that nobody writes any more; the driver's word counts more. What this process fills itself
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


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)


def _check_key(key: object) -> None:
    if not isinstance(key, WeightSetKey):
        raise InvalidArgument("key", key, "a WeightSetKey")


def _checked_seconds(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise InvalidArgument(name, value, "a positive number of seconds")
    return min(float(value), MAX_TIMEOUT_SECONDS)
