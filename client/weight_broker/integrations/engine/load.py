"""One load of one model: ask the broker, else read from disk; when the engine is done, publish or say why not."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from weight_broker.client import BrokerClient, IfAbsent
from weight_broker.errors import BrokerError, BrokerUnavailable, LayoutMismatch, TransferFailed
from weight_broker.integrations.checkpoint import CheckpointError
from weight_broker.integrations.engine import completeness, published, stage
from weight_broker.integrations.engine.engine import Engine, NotServable
from weight_broker.integrations.engine.options import Options
from weight_broker.integrations.engine.report import EngineLoad
from weight_broker.integrations.engine.tensors import other_state, weight_tensors, without_memory
from weight_broker.load_group import LoadGroup
from weight_broker.transfers.lease import ColdLoadLease
from weight_broker.transfers.load import prepare_memory

if TYPE_CHECKING:
    from weight_broker.key import WeightSetKey
    from weight_broker.memory.shared import Shared
    from weight_broker.transfers.publication import Publication
    from weight_broker.transfers.report import AcquireReport

# Of this process: no memory, descriptor or thread left. The disk may well do without.
_SHORTAGES = (OSError, MemoryError, ImportError)


class Reinitialise(Exception):
    """A transfer failed half way: the model is to be made anew before it is loaded from disk."""


class WeightsNotQuiesced(RuntimeError):
    """Somebody may still write to the memory of this process's weights: it must end."""


class Load:
    """The steps in their order: `prepare`, `weights`, `finish`; `abandon` if the engine fails in between."""

    def __init__(self, options: Options, engine: Engine) -> None:
        self.report = EngineLoad(engine.model)
        self._options = options
        self._engine = engine
        self._logger = engine.logger
        self._client: BrokerClient | None = None
        self._key: WeightSetKey | None = None
        self._group: LoadGroup | None = None
        self._lease: ColdLoadLease | None = None
        self._shared: Shared | None = None
        self._before: completeness.Snapshot | None = None
        self._unpublishable = ""
        self._disk_only = ""
        self._is_runtime = False

    def without_broker(self, why: str) -> None:
        """Decides for the disk."""
        self._disk_only = why
        self.report.acquire_error = why
        self._unpublishable = why
        self._complain(why)

    def prepare(self) -> None:
        """Makes the key, before the model is made: that changes the engine's configuration."""
        with self._timed("key"):
            try:
                self._key = self._engine.make_key(self._options)
            except (NotServable, CheckpointError, BrokerError, *_SHORTAGES) as error:
                self.without_broker(f"{self._engine.model} has no key: {error}")
                return
        rank = self._key.rank
        shown = f"{self._key.model}-{self._key.role}-tp{rank.tensor_parallel_rank}pp{rank.pipeline_parallel_rank}"
        self.report.weight_set_id = self._key.id
        self._client = BrokerClient(
            self._options.runtime_directory or None,
            name=self._options.name or shown,
            connect_timeout=self._options.connect_timeout,
            digest_mode=self._options.digest_mode,
        )
        ranks = self._engine.ranks(self._key)
        if ranks is not None:
            self._group = LoadGroup(*ranks, assembly_timeout=self._options.rank_timeout)

    def weights(self, model: nn.Module) -> None:
        """Fills `model`. Raises `Reinitialise` once, if it has to be made anew for that."""
        if not self._disk_only and self._key is not None:
            missing = without_memory(model)
            if missing:
                self.without_broker(f"{missing[0]} has no memory yet: it is quantized while it is read")
            elif self._options.stage != "loaded" and stage.is_shared_as_processed(
                model, self._engine.shared_as_processed
            ):
                self._is_runtime = True
                self._key = self._engine.runtime_key(self._key)
                self.report.weight_set_id = self._key.id
                self._engine.load_dummy_weights(model)
                return
            elif self._filled(weight_tensors(model)):
                # Of host memory others read a sealed copy, whatever becomes of this process's own.
                own = self._shared is not None and self._shared.needs_retraction
                self._before = self._snapshot(weight_tensors(model), contents=own)
                return
        state = other_state(model)
        with self._timed("load"):
            self._engine.load_weights(model)
        if self._publishing and not self._unpublishable:
            if not self._is_runtime:  # whatever loading left besides weights is compared after post-processing
                self._unpublishable = completeness.state_refusal(state, other_state(model))
            self._before = self._snapshot(weight_tensors(model), contents=not self._is_runtime)

    @property
    def is_to_fill(self) -> bool:
        """Whether the model was made without its weights, which are to be had as post-processing left them."""
        return self._is_runtime and not self._disk_only

    def fill(self, model: nn.Module) -> bool:
        """Puts processed weights into a processed model. False if it has to be made anew, and read from disk."""
        try:
            tensors = stage.processed_tensors(model)
            if self._filled(tensors):
                self._check_state(model, tensors)
                self._before = self._snapshot(tensors, contents=False)
                return True
            self._disk_only = "the broker has no processed weights"
        except Reinitialise:
            pass
        return False

    def finish(self, model: nn.Module) -> None:
        """The engine has post-processed: publishes, or refuses to."""
        published.note(self.report)
        try:
            if self._publishing:
                self._publish(model)
        except Exception as error:  # the model is loaded: whatever goes wrong now must not undo that
            self.report.not_published = f"{type(error).__name__}: {error}"
            self._logger.warning("%s is loaded but not published: %s", self._engine.model, error, exc_info=True)
            self._give_up(self.report.not_published, unpublishable=False)
        finally:
            self._close_shared()
            if not self.report.publication_id and self._client is not None:
                self._client.close()
        times = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in self.report.seconds.items())
        self._logger.info(
            "loaded %s from %s: weight set %s, %d tensors, %d bytes%s; %s; %s",
            self._engine.model,
            self.report.source,
            self.report.weight_set_id or "unknown",
            self.report.tensor_count,
            self.report.size_bytes,
            f" (verified: {self.report.verified})" if self.report.verified else "",
            times,
            f"offered as {self.report.publication_id}"
            if self.report.publication_id
            else f"not offered: {self.report.not_published}",
        )

    def abandon(self, error: BaseException) -> None:
        """The engine could not make the model: the next one is told to load."""
        self._give_up(f"the engine raised {type(error).__name__}", unpublishable=False)
        self._close_shared()
        if self._client is not None:
            self._client.close()

    # Filling

    def _check_state(self, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        if torch.equal(tensors[stage.STATE], stage.state_digest(model)):
            return
        self.report.source, self.report.source_publication_id = "disk", ""
        self._note_error(
            TransferFailed("post-processing left other numbers or flags here than where the weights are from")
        )
        self._close_shared()
        self._reinitialise("its objects are in another state than those of the source")

    def _filled(self, tensors: dict[str, torch.Tensor]) -> bool:
        """True if the tensors are filled from a peer; False if the model is to be read from disk."""
        with self._timed("acquire"):
            try:
                outcome = self._acquire(tensors)
            except BrokerError as error:
                self._fall_back(error)
                return False
            except _SHORTAGES as error:
                if self._options.strict:
                    raise
                self._note_error(error)
                return False
        if isinstance(outcome, ColdLoadLease):
            self._lease = outcome
            if outcome.touched:
                self._reinitialise("a source failed half way")
            if self._options.publish:
                prepare_memory(outcome, tensors)
            return False
        report, self._shared = outcome
        self.report.source = "peer"
        self.report.source_publication_id = report.source_publication_id
        self.report.source_generation = report.source_generation
        self.report.size_bytes, self.report.tensor_count = report.size_bytes, report.tensor_count
        self.report.verified = str(report.verified)
        return True

    def _acquire(self, tensors: dict[str, torch.Tensor]) -> tuple[AcquireReport, Shared | None] | ColdLoadLease:
        assert self._client is not None
        assert self._key is not None
        if_absent: IfAbsent = "fail"
        if self._options.wait:
            if_absent = "load" if self._options.publish else "wait"
        if self._options.zero_copy and not self._is_runtime:  # kernels may have noted where their weights are
            return self._map(tensors, if_absent)
        outcome = self._client._acquire_and_share(
            self._key, tensors, timeout=self._options.timeout, if_absent=if_absent, group=self._group
        )
        return outcome if isinstance(outcome, ColdLoadLease) else (outcome.report, outcome.shared)

    def _map(
        self, tensors: dict[str, torch.Tensor], if_absent: IfAbsent
    ) -> tuple[AcquireReport, Shared | None] | ColdLoadLease:
        """Puts views of the resident memory in place of the tensors' own."""
        from weight_broker.layout import differences
        from weight_broker.memory.tensors import describe

        assert self._client is not None
        assert self._key is not None
        outcome = self._client._attach_and_share(
            self._key, framework="torch", timeout=self._options.timeout, if_absent=if_absent, group=self._group
        )
        if isinstance(outcome, ColdLoadLease):
            return outcome
        attached, shared = outcome
        layout = describe(tensors).layout
        if attached.layout.fingerprint != layout.fingerprint:
            shared.close()
            text = "; ".join(differences(attached.layout, layout))
            raise LayoutMismatch(f"the resident weights have another layout: {text}", metadata={"differences": text})
        for name, tensor in tensors.items():
            tensor.data = attached[name]
        return attached.report, shared

    def _fall_back(self, error: BrokerError) -> None:
        if not error.quiesced:
            raise WeightsNotQuiesced(
                f"{self._engine.model} cannot be loaded: a transfer into this process's memory failed and may "
                f"still be running ({error}). End this process: nothing it loads there is safe."
            ) from error
        if self._options.strict:
            raise error
        self._note_error(error)
        if error.touched:
            self._reinitialise(str(error))

    def _note_error(self, error: Exception) -> None:
        self.report.acquire_error = f"{type(error).__name__}: {error}"
        if isinstance(error, BrokerUnavailable):
            # Harmless: there is none, or it has gone. One that comes later is none of this load's business.
            self._unpublishable = self.report.acquire_error
        self._logger.warning("loading %s from disk: %s", self._engine.model, error)

    def _reinitialise(self, why: str) -> None:
        self._disk_only = why
        raise Reinitialise(why)

    def _complain(self, why: str) -> None:
        if self._options.strict:
            raise NotServable(f"{why} (the option `strict` forbids to load without the broker)")
        self._logger.warning("loading %s without the broker: %s", self._engine.model, why)

    # Publishing

    @property
    def _publishing(self) -> bool:
        return self._options.publish and self._client is not None and self._key is not None

    def _snapshot(self, tensors: dict[str, torch.Tensor], *, contents: bool) -> completeness.Snapshot | None:
        if not self._publishing:
            return None
        with self._timed("check"):
            try:
                return completeness.snapshot(tensors, contents=contents)
            except BrokerError as error:  # what cannot be shared
                self._unpublishable = self._unpublishable or str(error)
                return None

    def _publish(self, model: nn.Module) -> None:
        assert self._client is not None
        assert self._key is not None
        tensors = stage.processed_tensors(model) if self._is_runtime else weight_tensors(model)
        refusal = self._unpublishable or self._refusal(model, tensors)
        if refusal:
            self.report.not_published = refusal
            if refusal != self.report.acquire_error:  # that has been said
                self._logger.warning("%s is loaded but not published: %s", self._engine.model, refusal)
            self._give_up(refusal, unpublishable=True)
            return
        assert self._before is not None
        offered = tensors if self._is_runtime else {name: tensors[name] for name in self._before.places}
        with self._timed("publish"):
            publication = self._offer(offered)
        self.report.publication_id = publication.id
        self.report.size_bytes, self.report.tensor_count = publication.size_bytes, len(publication.layout)
        published.add(
            published.PublishedModel(
                weakref.ref(model),
                self._client,
                self._key,
                self._group,
                tuple(offered),
                self.report,
                self._logger,
                publication,
            )
        )
        self._engine.watch(model)

    def _offer(self, tensors: dict[str, torch.Tensor]) -> Publication:
        assert self._client is not None
        assert self._key is not None
        if self._shared is not None:  # sealed, and verified when it was read: nothing needs to be copied
            shared, self._shared = self._shared, None
            return self._client._publish_shared(self._key, shared, group=self._group)
        publication = self._client.publish(self._key, tensors, lease=self._lease, group=self._group)
        self._lease = None
        return publication

    def _refusal(self, model: nn.Module, tensors: dict[str, torch.Tensor]) -> str:
        if self._options.stage == "runtime" and not self._is_runtime:
            return "no quantization method of this model is on the list of those shared in the stage runtime"
        if self._before is None:
            return "the weights were not seen before post-processing"
        if self._is_runtime:
            moved, vanished = completeness.moved_and_vanished(
                self._before, completeness.snapshot(weight_tensors(model), contents=False)
            )
            if self.report.source == "peer":  # it was post-processed before it was filled
                return ""
            return stage.processed_refusal(model, self._engine, moved, vanished)
        with self._timed("check"):
            contents = self._before.contents is not None
            kept = {name: tensor for name, tensor in tensors.items() if name in self._before.places}
            after = completeness.snapshot(kept, contents=contents)
        return completeness.refusal(self._before, after)

    def _give_up(self, reason: str, *, unpublishable: bool) -> None:
        lease, self._lease = self._lease, None
        if lease is None:
            return
        try:
            lease.give_up(reason, unpublishable=unpublishable)
        except BrokerError as error:
            self._logger.warning("%r could not be given up: %s", lease, error)

    def _close_shared(self) -> None:
        shared, self._shared = self._shared, None
        if shared is not None:
            shared.close()

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self.report.seconds[step] = self.report.seconds.get(step, 0.0) + time.monotonic() - begun
