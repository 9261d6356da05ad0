"""The public client: fill this process's tensors from a peer, and offer them to others."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from weight_broker.connection.session import Attachment
from weight_broker.errors import BrokerError, InvalidArgument
from weight_broker.key import WeightSetKey
from weight_broker.memory.digest_mode import DigestMode
from weight_broker.memory.kind import Terms
from weight_broker.memory.policy import staging_policy
from weight_broker.transfers import load as loading
from weight_broker.transfers.exchange import (
    PUBLISH_TIMEOUT_SECONDS,
    Exchange,
    Framework,
    IfAbsent,
    Request,
    checked_seconds,
)
from weight_broker.transfers.lease import ColdLoadLease
from weight_broker.transfers.publication import Publication, publications_of
from weight_broker.transfers.report import AcquireReport, AttachedTensors, LoadReport
from weight_broker.transfers.written import TensorSource

if TYPE_CHECKING:
    from weight_broker.load_group import LoadGroup

_logger = logging.getLogger("weight_broker")


class BrokerClient:
    """This process's way to its host's broker.

    The constructor only stores its arguments. The first call attaches to the broker; all threads then use one session.
    A forked child has a client in the state of a new one; publications stay with the parent. What a client has
    published stays published until `close`, also when the client is not referenced any more.

    `runtime_directory` is where the broker's sockets are (None: the usual places); `name` is shown to people;
    `connect_timeout` bounds the time, in seconds, that an unresponsive broker can cost; `digest_mode` says how much of
    the content is verified: "full", "sampled", or "auto" for full where XXH3 is installed; `device_path` how device
    memory is read and filled: "direct" in place, "staged" through a staging buffer of the broker, "auto" for direct
    where that is possible (None: WEIGHT_BROKER_DEVICE_PATH, or "auto").
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
        self._attachment = Attachment(directory, name, checked_seconds("connect_timeout", connect_timeout))
        self._exchange = Exchange(self._attachment, Terms(DigestMode(digest_mode), staging_policy(device_path)))

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

        Without a source: `WeightsNotFound`, at once unless another process is loading the weight set and `wait` is
        True. `timeout` is in seconds and bounds the whole call. `group` is the engine that this process is a rank of:
        its ranks are all filled from the ranks of one other engine, or none is."""
        filled = self._exchange.fill(Request(key, timeout, _if_absent(wait), group), tensors)
        if isinstance(filled, ColdLoadLease):
            raise _unasked(filled)
        return filled.report

    def acquire_or_lease(
        self,
        key: WeightSetKey,
        tensors: Mapping[str, object],
        *,
        timeout: float = 300.0,
        group: LoadGroup | None = None,
    ) -> AcquireReport | ColdLoadLease:
        """Like `acquire`, but without a source exactly one process gets the lease: it loads from disk and calls
        `publish` with the lease (or `give_up` on it). All others wait for that. Use the lease as a context manager: a
        block that ends without either gives the lease up."""
        filled = self._exchange.fill(Request(key, timeout, "load", group), tensors)
        return filled if isinstance(filled, ColdLoadLease) else filled.report

    def acquire_or_load(
        self,
        key: WeightSetKey,
        tensors: TensorSource,
        load: Callable[[], None],
        *,
        timeout: float = 300.0,
        publish: bool = True,
    ) -> LoadReport:
        """Fills `tensors` from a peer, or calls `load`, which loads them from disk, and then offers them to others.

        `tensors` is a mapping, or a function that returns one, which is called again after `load`; the mapping of
        `weight_broker.integrations.torch.tensors_of` is looked up again too. `load` is called at most once, and its
        exceptions pass through unchanged. What it did not write is not published: `publish_error` names it.

        No failure of the broker, and no failure to publish, is raised; both are logged and stand in the report. The one
        exception: an error with `quiesced` False, after which the tensors' storages must be discarded.
        """
        with self._load(key, timeout=timeout, publish=publish) as attempt:
            if not attempt.fill(tensors):
                attempt.watch(tensors)
                load()
            attempt.publish(tensors)
        return attempt.report

    def attach_tensors(
        self,
        key: WeightSetKey,
        *,
        framework: Framework = "torch",
        timeout: float = 300.0,
        wait: bool = True,
    ) -> AttachedTensors:
        """Tensors (of `framework` "torch" or "numpy") that are copy-on-write views of the resident memory: takes
        milliseconds at any size, and no memory before the first write. A sample of each tensor is verified (with
        digest mode "full", everything): the memory is sealed since it was published."""
        mapped = self._exchange.map(Request(key, timeout, _if_absent(wait)), framework)
        if isinstance(mapped, ColdLoadLease):
            raise _unasked(mapped)
        return mapped.tensors

    def publish(
        self,
        key: WeightSetKey,
        tensors: Mapping[str, object],
        *,
        lease: ColdLoadLease | None = None,
        group: LoadGroup | None = None,
        timeout: float = PUBLISH_TIMEOUT_SECONDS,
        in_host_memory: bool = False,
    ) -> Publication:
        """Offers `tensors` as a source for others. Host memory is copied once: it may be changed and freed afterwards.
        Device memory is shared where it is: it must not change, move or be freed before `Publication.retract`. With
        `in_host_memory` it is copied to host memory instead, and devices are filled from there.

        `lease` is the cold-load lease that this fulfils; `group` the engine that this process is a rank of: what its
        ranks publish is read together. `PublishRefused`: the message says why and what to do.
        """
        return self._exchange.publish(
            key, tensors, lease=lease, group=group, timeout=timeout, in_host_memory=in_host_memory
        )

    def close(self) -> None:
        """Retract all publications of this client and detach from the broker. Idempotent; in a forked child it ends
        nothing of the parent's. `RetractTimeout`, `BrokerUnavailable`: device memory may still be read and must not be
        freed; call again."""
        publications = publications_of(self._attachment)
        for publication in publications:
            if publication.needs_retraction:
                publication.retract()
        for publication in publications:
            publication.expire()
        self._attachment.end()
        self._exchange.let_go()
        for publication in publications:
            publication.abandon()

    def __enter__(self) -> BrokerClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _load(
        self,
        key: WeightSetKey,
        *,
        timeout: float,
        publish: bool,
        wait: bool = True,
        group: LoadGroup | None = None,
        strict: bool = False,
        logger: logging.Logger = _logger,
    ) -> loading.Load:
        """A load in steps, for the package's own loaders."""
        return loading.Load(
            self._exchange, key, timeout=timeout, publish=publish, wait=wait, group=group, strict=strict, logger=logger
        )


def _if_absent(wait: bool) -> IfAbsent:
    return "wait" if wait else "fail"


def _unasked(lease: ColdLoadLease) -> BrokerError:
    """Give the lease to the next waiter: this caller cannot load."""
    with contextlib.suppress(BrokerError):
        lease.give_up("not asked for")
    return BrokerError("the broker granted a cold-load lease that was not asked for", touched=lease.touched)
