"""One load of one model: ask the broker, else read from disk; when the engine is done, publish or say why not."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch
from torch import nn

import weight_broker.transfers.imports  # noqa: F401
from weight_broker.client import BrokerClient
from weight_broker.errors import BrokerError, BrokerUnavailable
from weight_broker.integrations.checkpoint import CheckpointError, DamageCheck
from weight_broker.integrations.engine import completeness, published, stage
from weight_broker.integrations.engine.completeness import Comparison, is_copied_to_publish
from weight_broker.integrations.engine.engine import Engine, NotServable
from weight_broker.integrations.engine.options import Options
from weight_broker.integrations.engine.report import EngineLoad, process_seconds
from weight_broker.integrations.engine.tensors import other_state, weight_tensors, without_memory
from weight_broker.integrations.modules.replacing import viewed_elsewhere
from weight_broker.load_group import LoadGroup
from weight_broker.transfers import load as loading
from weight_broker.transfers.load import SURVIVABLE
from weight_broker.transfers.written import Watch

if TYPE_CHECKING:
    from weight_broker.key import WeightSetKey
    from weight_broker.transfers.publication import Publication
    from weight_broker.transfers.report import AcquireReport


_SHOWN = 4


class Reinitialise(Exception):
    """A transfer failed half way: the model must be created again before it is loaded from disk."""


class WeightsNotQuiesced(RuntimeError):
    """A transfer may still write to the memory of this process's weights: the process must end."""


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
        self._load: loading.Load | None = None
        self._comparison = Comparison()
        self._loaded_key: WeightSetKey | None = None
        """The key before it was made one of processed weights."""
        self._disk_only = self._not_runtime = ""
        self._is_runtime = self._keeps_client = False
        self._mark = time.monotonic()
        """End of the loader's last step."""
        self._engines_step = "load"
        """What the engine does until the loader's next step; without the broker it loads in its own way."""
        self._is_offered = False
        """Whether it is settled what is published, or why nothing is."""
        self._published: tuple[Publication, tuple[str, ...]] | None = None
        """The publication and the names of its tensors."""
        self._check: DamageCheck | None = None

    def without_broker(self, why: str) -> None:
        """Load from disk. Raises `NotServable` with the option `strict`."""
        self._disk_only = why
        self.report.acquire_error = why
        self._comparison.refused = why
        self._complain(why)

    def prepare(self) -> None:
        """Make the key. Called before the model is created, which changes the engine's configuration."""
        if not published.reports():
            with suppress(OSError):
                self.report.seconds["process"] = process_seconds()
        try:
            self._prepare()
        finally:
            self._mark = time.monotonic()

    def _prepare(self) -> None:
        with self._timed("key"):
            try:
                self._key = self._engine.make_key(self._options)
            except (NotServable, CheckpointError, *SURVIVABLE) as error:
                self.without_broker(f"{self._engine.model} has no key: {error}")
                return
        self.report.weight_set_id = self._key.id
        try:
            ranks = self._engine.ranks(self._key)
            if ranks is not None:
                self._group = LoadGroup(*ranks, assembly_timeout=self._options.rank_timeout)
            self._client = self._make_client(self._key)
        except SURVIVABLE as error:
            self.without_broker(f"{self._engine.model} cannot ask the broker: {error}")

    def _make_client(self, key: WeightSetKey) -> BrokerClient:
        rank = key.rank
        shown = f"{key.model}-{key.role}-tp{rank.tensor_parallel_rank}pp{rank.pipeline_parallel_rank}"
        return BrokerClient(
            self._options.runtime_directory or None,
            name=self._options.name or shown,
            connect_timeout=self._options.connect_timeout,
            digest_mode=self._options.digest_mode,
        )

    def weights(self, model: nn.Module) -> None:
        """Fill `model`. Raises `Reinitialise` once, if the model must be created again."""
        self._engines_step = "make"
        with self._own_step():
            self._weights(model)
        self._engines_step = "post_process"

    def _weights(self, model: nn.Module) -> None:
        if not self._disk_only and self._key is not None:
            missing = without_memory(model)
            if missing:
                self.without_broker(f"{missing[0]} has no memory yet: it is quantized while it is read")
            elif self._is_shared_as_processed(model):
                self._is_runtime, self._loaded_key = True, self._key
                self._key = self._engine.runtime_key(self._key)
                self.report.weight_set_id = self._key.id
                self._engine.load_dummy_weights(model)
                return
            elif self._filled(weight_tensors(model)):
                self._after_loading(model)
                return
        state, watch = other_state(model), self._watch(model)
        self._start_check()
        with self._timed("load"):
            self._engine.load_weights(model)
        if watch is not None:
            self._refuse_left_over(watch.left_over(dict(model.named_parameters())))
        if self._publishing and not self._comparison.refused:
            self._comparison.refused = self._engine.covered.refusal()
        if self._publishing and not self._comparison.refused:
            if not self._is_runtime:  # in the stage `runtime` the rest of the state is published with the weights
                self._comparison.refused = completeness.state_refusal(state, other_state(model))
            self._after_loading(model)

    @property
    def is_to_fill(self) -> bool:
        """Whether the model was created without its weights and awaits processed ones."""
        return self._is_runtime and not self._disk_only

    def dummies_failed(self, error: Exception) -> None:
        """Post-processing does not work on dummy weights. The model is created again and shared as loading leaves
        it."""
        assert self._loaded_key is not None
        self._is_runtime, self._key = False, self._loaded_key
        self.report.weight_set_id = self._key.id
        self._not_runtime = f"post-processing does not work on dummy weights ({type(error).__name__}: {error})"
        self._logger.warning("the model is created again: %s", self._not_runtime)

    def fill(self, model: nn.Module) -> bool:
        """Put processed weights into a processed model. False: create the model again and read from disk."""
        with self._own_step():
            return self._fill(model)

    def _fill(self, model: nn.Module) -> bool:
        try:
            tensors = stage.processed_tensors(model)
            if self._filled(tensors):
                self._comparison.note_before(tensors, contents=False)
                return True
            self._disk_only = "the broker has no processed weights"
        except Reinitialise:
            pass
        return False

    def finish(self, model: nn.Module) -> None:
        """Publish after post-processing, or say in the report why not. Never raises."""
        with self._own_step():
            self._finish(model)

    def _finish(self, model: nn.Module) -> None:
        published.note(self.report)
        with self._harmless():
            if self._publishing and not self._is_offered:
                self._publish(model)
            self._keep(model)
        self._close()
        self._logger.info("%s", self.report.summary())

    def abandon(self, error: BaseException) -> None:
        """The engine could not create the model. The lease goes to the next waiter; what is published is retracted."""
        self.report.publication_id, self._keeps_client = "", False
        self._close(f"the engine raised {type(error).__name__}")

    # Filling

    def _filled(self, tensors: dict[str, torch.Tensor]) -> bool:
        """True if the tensors are filled from a peer; False if the model must be read from disk."""
        load = self._begun()
        with self._timed("acquire"):
            try:
                is_filled = self._fill_or_map(load, tensors)
            except BrokerError as error:
                if error.quiesced:
                    raise  # the option `strict`
                raise WeightsNotQuiesced(
                    f"{self._engine.model} cannot be loaded: a transfer into this process's memory failed and may "
                    f"still be running ({error}). End this process: nothing it loads there is safe."
                ) from error
        if is_filled:
            self._note_source(load.report.report)
            return True
        self.report.acquire_error = load.report.acquire_error or ""
        if issubclass(load.failure or type(None), BrokerUnavailable):
            # There is no broker, or it has ended. This load does not publish with a later one.
            self._comparison.refused = self.report.acquire_error
        if load.touched:
            self._reinitialise(self.report.acquire_error or "a source failed half way")
        return False

    def _begun(self) -> loading.Load:
        """The load of the key. Only after `prepare` has succeeded."""
        if self._load is None:
            assert self._client is not None
            assert self._key is not None
            options = self._options
            self._load = self._client._load(
                self._key,
                timeout=options.timeout,
                publish=options.publish,
                wait=options.wait,
                group=self._group,
                strict=options.strict,
                logger=self._logger,
            )
        return self._load

    def _watch(self, model: nn.Module) -> Watch | None:
        """For what the load writes; None if nothing will be published."""
        if self._publishing and not self._comparison.refused:
            with suppress(*SURVIVABLE):  # publishing reports what cannot be shared
                return Watch(dict(model.named_parameters()))
        return None

    def _refuse_left_over(self, names: list[str]) -> None:
        if names:
            shown = ", ".join(names[:_SHOWN])
            self._comparison.refused = f"the load did not write {len(names)} parameters ({shown})"

    def _fill_or_map(self, load: loading.Load, tensors: dict[str, torch.Tensor]) -> bool:
        # After post-processing kernels may have stored addresses of weights; a device maps no host memory.
        if not self._options.zero_copy or self._is_runtime or not is_copied_to_publish(tensors):
            return load.fill(tensors)
        if viewed := viewed_elsewhere(tensors):
            self._logger.info("copying the weights instead of mapping them: something has a view of %s", viewed)
            return load.fill(tensors)
        attached = load.map("torch", like=tensors)
        if attached is None:
            return False
        for name, tensor in tensors.items():
            tensor.data = attached[name]
        return True

    def _note_source(self, acquired: AcquireReport | None) -> None:
        assert acquired is not None
        report = self.report
        report.source, report.path = "peer", acquired.path
        report.source_publication_id = acquired.source_publication_id
        report.source_generation = acquired.source_generation
        report.size_bytes, report.tensor_count = acquired.size_bytes, acquired.tensor_count
        report.verified = str(acquired.verified)

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

    def _is_shared_as_processed(self, model: nn.Module) -> bool:
        if (
            self._options.stage == "loaded"
            or self._not_runtime
            or not stage.is_shared_as_processed(model, self._engine.shared_as_processed)
        ):
            return False
        return self._options.stage == "runtime" or not is_copied_to_publish(weight_tensors(model))

    def _after_loading(self, model: nn.Module) -> None:
        """The weights are what the engine's loader left. A copy of them is published now: post-processing may
        change them. Memory that is published in place must still be the same after post-processing."""
        if not self._publishing:
            return
        tensors = weight_tensors(model)
        is_copied = is_copied_to_publish(tensors)
        if self._is_runtime or not (is_copied or self._copies_to_host):
            with self._timed("check"):
                self._comparison.note_before(tensors, contents=not self._is_runtime)
            return
        with self._harmless():
            refusal = self._comparison.refused or self._stage_refusal()
            self._offer(tensors, refusal, in_host_memory=not is_copied)

    @property
    def _copies_to_host(self) -> bool:
        """Whether weights on a device are published as a copy in host memory."""
        if self._options.host_copy == "auto":
            return self._engine.rewrites_weights or (self._load is not None and self._load.holds_copy)
        return self._options.host_copy == "always"

    def _publish(self, model: nn.Module) -> None:
        """After post-processing."""
        tensors = stage.processed_tensors(model) if self._is_runtime else weight_tensors(model)
        refusal = self._comparison.refused or self._stage_refusal() or self._refusal(model, tensors)
        if refusal or self._is_runtime:
            self._offer(tensors, refusal)
        else:
            self._offer(self._comparison.noted(tensors), "")

    def _offer(self, tensors: dict[str, torch.Tensor], refusal: str, *, in_host_memory: bool = False) -> None:
        self._is_offered = True
        if refusal:
            self.report.not_published = refusal
            if refusal != self.report.acquire_error:  # logged already
                self._logger.warning("%s is loaded but not published: %s", self._engine.model, refusal)
            self._begun().give_up(refusal, unpublishable=True)
            return
        with self._timed("publish"):
            load = self._begun()
            publication = load.publish(tensors, self._check, in_host_memory=in_host_memory)
        if publication is None:
            self.report.not_published = load.report.publish_error or self.report.acquire_error
            return
        self._keeps_client = True
        self._published = publication, tuple(tensors)
        self.report.publication_id = publication.id
        self.report.size_bytes, self.report.tensor_count = publication.size_bytes, len(publication.layout)

    def _keep(self, model: nn.Module) -> None:
        """Register the publication, so that it is retracted before the weights change."""
        if self._published is None:
            return
        assert self._client is not None
        assert self._key is not None
        publication, names = self._published
        entry = published.PublishedModel(
            weakref.ref(model), self._client, self._key, self._group, names, self.report, self._logger, publication
        )
        published.add(entry)
        self._engine.watch(model)
        if publication.waiting is not None:
            self.report.not_published = "the checkpoint is being compared with what was downloaded"
            publication.waiting.then(entry.waited)

    def _start_check(self) -> None:
        """Compare files that the hub's cache knows, beside the load. Each rank takes a part of them: what the ranks
        publish is read together or not at all."""
        if self._publishing and self._check is None:
            member, size = (self._group.member, self._group.size) if self._group is not None else (0, 1)
            self._check = DamageCheck(self._engine.covered.files[member::size])
            self._check.start()

    def _stage_refusal(self) -> str:
        if self._options.stage == "runtime" and not self._is_runtime:
            return self._not_runtime or (
                "no quantization method of this model is on the list of those shared in the stage runtime"
            )
        return ""

    def _refusal(self, model: nn.Module, tensors: dict[str, torch.Tensor]) -> str:
        with self._timed("check"):
            if not self._is_runtime:
                return self._comparison.refusal(tensors)
            if self.report.source == "peer":  # the model was post-processed before it was filled
                return self._comparison.missing()
            return self._comparison.processed_refusal(model, self._engine, weight_tensors(model))

    @contextmanager
    def _own_step(self) -> Iterator[None]:
        """For a step of this loader's: the time since the last one was the engine's."""
        step = self._engines_step
        self.report.seconds[step] = self.report.seconds.get(step, 0.0) + time.monotonic() - self._mark
        try:
            yield
        finally:
            self._mark = time.monotonic()

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """For what follows a load: the model is loaded, and no failure may undo that."""
        try:
            yield
        except Exception as error:
            self._is_offered = True
            self.report.not_published = f"{type(error).__name__}: {error}"
            self._logger.warning("%s is loaded but not published: %s", self._engine.model, error, exc_info=True)

    def _close(self, reason: str = "nothing was published") -> None:
        """Give back the lease; close the client too, unless a publication needs it."""
        if self._load is not None:
            self._load.close(reason)
        if self._client is None or self._keeps_client:
            return
        if self._check is not None:
            self._check.stop()
        try:
            self._client.close()
        except SURVIVABLE as error:
            self._logger.warning("the client of %s could not be closed: %s", self._engine.model, error)

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self.report.seconds[step] = self.report.seconds.get(step, 0.0) + time.monotonic() - begun
