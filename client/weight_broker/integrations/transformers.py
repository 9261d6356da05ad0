"""Loads a `transformers` causal language model through the broker.

The model is built on the meta device, so nothing is initialised at random. Then its weights are the resident ones of
another instance on this host (mapped copy-on-write, or copied), or they are read from disk and offered to others.
Weights read from disk are copied out of the checkpoint's mapping into allocated memory, because some kernels give
different last bits for different alignments: the logits are then equal bit for bit for every source of the weights.

`from_pretrained` loads what the broker cannot serve: quantized checkpoints, checkpoints that lack weights, and models
whose weights on disk do not fit the model on the meta device. `LoadReport.acquire_error` then says why."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as transformers_logging

from weight_broker.errors import AcquireTimeout, BrokerError, BrokerUnavailable, InvalidArgument, WeightsNotFound
from weight_broker.integrations.checkpoint import (
    CheckpointError,
    DamageCheck,
    checkpoint_digest,
    checkpoint_files,
    checkpoint_name,
    checkpoint_tensors,
    unlike_model,
    utf8_path,
)
from weight_broker.integrations.modules.tensors import ModuleTensors
from weight_broker.integrations.torch import assign_tensors, copy_tensors, materialise_empty, tensors_of
from weight_broker.key import WeightSetKey
from weight_broker.transfers.load import Load
from weight_broker.transfers.report import AttachedTensors, LoadReport

if TYPE_CHECKING:
    import os

    from transformers import PreTrainedModel

    from weight_broker.client import BrokerClient

_logger = logging.getLogger("weight_broker")
# Not everything in transformers is typed, and some of it wrongly.
_auto_model: Any = AutoModelForCausalLM
_progress: Any = transformers_logging

# While it builds a model, transformers replaces methods of its classes: two threads would see each other's.
_building = threading.Lock()

_HOPELESS = (BrokerUnavailable, AcquireTimeout, WeightsNotFound)
"""Failures of a mapping after which a copy would fail too."""
_ADAPTER = "adapter_config.json"
_SHOWN = 4
_FLOATING = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
_HOST = torch.device("cpu")
"""A context: the model is in host memory also where the caller has made another device the default."""


def load_causal_lm(
    model_dir: str | os.PathLike[str],
    client: BrokerClient | None,
    *,
    key: WeightSetKey | None = None,
    dtype: torch.dtype | str | None = None,
    zero_copy: Literal["auto"] | bool = "auto",
    publish: bool = True,
    timeout: float = 300.0,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, LoadReport]:
    """The model in `model_dir` in evaluation mode, none of its weights requiring gradients, and how it was loaded.

    `key` replaces the one of `weight_set_key`; `dtype` is by default the checkpoint's own. With `zero_copy` the
    weights are copy-on-write views of the resident ones, which takes milliseconds and no memory; "auto" falls back to a
    copy where that is refused, True to disk, False always copies. `timeout` bounds the wait for the broker and for
    another instance's cold load, in seconds. `client=None`, or no broker, loads from disk.

    Raises what loading from disk raises. A failure of the broker only leads to a load from disk.
    """
    begun = time.monotonic()
    with _HOST:
        return _load(
            _Source(Path(model_dir), dtype, attn_implementation, trust_remote_code),
            client, key, zero_copy, publish, begun, timeout,
        )  # fmt: skip


def _load(
    source: _Source,
    client: BrokerClient | None,
    key: WeightSetKey | None,
    zero_copy: Literal["auto"] | bool,
    publish: bool,
    begun: float,
    timeout: float,
) -> tuple[PreTrainedModel, LoadReport]:
    try:
        source.check_servable()
        if client is None:
            started = time.monotonic()
            model = _from_disk(source)
            report = LoadReport("disk", 0.0, 0.0, load_seconds=time.monotonic() - started)
        else:
            if key is None:
                key = _key_of(source)
            model, report = _through_broker(client, source, key, zero_copy, publish, begun + timeout)
    except (_NotServable, CheckpointError) as error:
        started = time.monotonic()
        model = source.model_as_read()
        report = LoadReport("disk", 0.0, 0.0, time.monotonic() - started, acquire_error=str(error))
    model.train(False).requires_grad_(False)
    # Measured from the call: the key and the empty model are part of a start's waiting time.
    seconds = time.monotonic() - begun
    waited = max(seconds - report.load_seconds - report.publish_seconds, 0.0)
    return model, replace(report, seconds=seconds, acquire_seconds=waited)


def weight_set_key(
    model_dir: str | os.PathLike[str], *, dtype: torch.dtype | str | None = None, trust_remote_code: bool = False
) -> WeightSetKey:
    """The key that `load_causal_lm` uses: name, revision and digest of the checkpoint, type, architecture, and the
    version of transformers without its patch level, as that decides how a checkpoint becomes weights.

    Raises `CheckpointError` if there is no safetensors checkpoint in `model_dir`.
    """
    return _Source(Path(model_dir), dtype, None, trust_remote_code).key()


def _key_of(source: _Source) -> WeightSetKey:
    """Raises `CheckpointError` and `_NotServable`: then the disk has the last word."""
    try:
        return source.key()
    except (BrokerError, OSError) as error:
        raise _NotServable(f"the checkpoint has no key: {error}") from error


class _NotServable(Exception):
    """The broker cannot serve this model; the text says why."""


class _Source:
    """A model directory, and the ways to make a model of it."""

    def __init__(
        self, directory: Path, dtype: torch.dtype | str | None, attn_implementation: str | None, trust_remote_code: bool
    ) -> None:
        self.directory = directory
        self.check: DamageCheck | None = None
        """Started when the weights are read from disk."""
        self._options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        self._read: PreTrainedModel | None = None
        self._is_adapter = (directory / _ADAPTER).is_file()
        if not self._is_adapter:  # else the configuration is that of the model which it adapts
            self.config = AutoConfig.from_pretrained(directory, local_files_only=True, **self._options)
        if attn_implementation is not None:
            self._options["attn_implementation"] = attn_implementation
        self.dtype = dtype or "auto" if self._is_adapter else _resolve_dtype(dtype, self.config, directory)

    def check_servable(self) -> None:
        """Raises `_NotServable` for a model that cannot be built empty and then filled."""
        if self._is_adapter:
            raise _NotServable("adapters are not served: their weights are those of another model, changed")
        if getattr(self.config, "quantization_config", None) is not None:
            raise _NotServable("quantized checkpoints are not served")
        if self.dtype is None:
            raise _NotServable("neither the configuration nor a safetensors file says which type the weights have")

    def key(self) -> WeightSetKey:
        if self._is_adapter:
            raise CheckpointError(f"{self.directory} is an adapter: most of its weights are in another directory")
        name, revision = checkpoint_name(self.directory)
        return WeightSetKey(
            model=name,
            revision=revision,
            checkpoint_digest=checkpoint_digest(self.directory),
            dtype=str(self.dtype).removeprefix("torch."),
            engine_attributes={
                "architecture": ",".join(self.config.architectures or ()) or self.config.model_type,
                "transformers": ".".join(transformers.__version__.split(".")[:2]),
            },
        )

    def model_on_meta(self) -> PreTrainedModel:
        """The model without weights."""
        with _building, torch.device("meta"):
            model: PreTrainedModel = _auto_model.from_config(self.config, dtype=self.dtype, **self._options)
        self._check_names(model)
        if model.can_generate():
            try:
                model.generation_config = GenerationConfig.from_pretrained(self.directory, local_files_only=True)
            except OSError:  # there is no such file; from_pretrained then looks into the model's configuration
                model.generation_config = GenerationConfig.from_pretrained(
                    self.directory, config_file_name="config.json", _from_model_config=True, local_files_only=True
                )
        return model

    def _check_names(self, model: PreTrainedModel) -> None:
        sizes = {name: tensor.numel() for name, tensor in model.named_parameters()}
        with suppress(CheckpointError, OSError):  # the caller's key may be of weights that are not here any more
            unlike = unlike_model(checkpoint_files(self.directory), sizes)
            if unlike:
                raise _NotServable(unlike)

    def model_to_fill(self) -> PreTrainedModel:
        """The model with memory for its weights, not yet written. Raises `_NotServable`."""
        model = self.model_on_meta()
        try:
            materialise_empty(model)
        except BrokerError as error:
            raise _NotServable(str(error)) from error
        return model

    def model_as_read(self) -> PreTrainedModel:
        """The model as `from_pretrained` makes it; its weights may be views of the checkpoint's files."""
        return self._read if self._read is not None else self._from_pretrained()[0]

    def stop_check(self) -> None:
        """Nothing is published."""
        if self.check is not None:
            self.check.stop()

    def fill(self, model: PreTrainedModel) -> None:
        """Reads the checkpoint into the memory that `model` has. Raises `_NotServable` if it does not fit."""
        if self.check is not None:
            self.check.start()
        read, problems = self._from_pretrained()
        wanted, found = tensors_of(model), tensors_of(read)
        lacking = sorted(map(str, [*problems["missing_keys"], *problems["mismatched_keys"]]))
        if lacking or _shapes(found) != _shapes(wanted):
            self._read = read
            raise _NotServable(
                f"the checkpoint lacks {', '.join(lacking[:8])}"
                if lacking
                else "the weights as read differ in name, shape, type or ties from what the model declares"
            )
        changed = _other_numbers(found, wanted)
        if changed:
            self._read = read
            raise _NotServable(f"loading changes more than tensors: {changed}")
        copy_tensors(wanted, found)

    def _from_pretrained(self) -> tuple[PreTrainedModel, dict[str, Any]]:
        with _building, _without_progress_bar(), utf8_path(self.directory) as directory:
            model, problems = _auto_model.from_pretrained(
                directory,
                dtype=self.dtype or "auto",
                output_loading_info=True,
                local_files_only=True,
                **self._options,
            )
        return model, problems


def _through_broker(
    client: BrokerClient,
    source: _Source,
    key: WeightSetKey,
    zero_copy: Literal["auto"] | bool,
    publish: bool,
    deadline: float,
) -> tuple[PreTrainedModel, LoadReport]:
    with client._load(key, timeout=max(deadline - time.monotonic(), 0.001), publish=publish) as load:
        if publish:
            with suppress(CheckpointError):  # the caller's key may be of a directory that has no digest
                source.check = DamageCheck(checkpoint_files(source.directory))
        try:
            model = _loaded(load, source, zero_copy)
            publication = load.publish(lambda: tensors_of(model), source.check)
        except BaseException:
            source.stop_check()
            raise
        if publication is None:
            source.stop_check()
    return model, load.report


def _loaded(load: Load, source: _Source, zero_copy: Literal["auto"] | bool) -> PreTrainedModel:
    """Views of the resident weights, a copy of them, or what is on disk."""
    if zero_copy is not False:
        attached = load.map("torch")
        if attached is not None:
            return _with_views(source, attached)
        is_hopeless = issubclass(load.failure or type(None), _HOPELESS)
        if zero_copy is True or load.has_lease or is_hopeless:
            with suppress(CheckpointError, OSError):  # no checkpoint whose size is known before it is read
                load.prepare_memory(sum(file.stat().st_size for file in checkpoint_files(source.directory)))
            return _from_disk(source)
    model = source.model_to_fill()
    if not load.fill(tensors_of(model)):
        source.fill(model)
    return model


def _with_views(source: _Source, attached: AttachedTensors) -> PreTrainedModel:
    model = source.model_on_meta()
    try:
        assign_tensors(model, attached)
    except BrokerError as error:
        raise _NotServable(str(error)) from error
    return model


def _from_disk(source: _Source) -> PreTrainedModel:
    model = source.model_to_fill()
    source.fill(model)
    return model


def _shapes(tensors: ModuleTensors) -> dict[str, tuple[object, ...]]:
    """Equal for two sets of weights that can replace each other; a tie is the name of its first tensor."""
    first: dict[int, str] = {}
    return {
        name: (*(_form(tensor)), first.setdefault(id(tensor), name) if name not in tensors.compared else "")
        for name, tensor in sorted(tensors.items())
    }


def _form(tensor: Any) -> tuple[object, ...]:
    if isinstance(tensor, torch.Tensor):
        return tensor.dtype, tensor.shape, tensor.stride()
    return tensor.dtype, tensor.shape, tensor.strides


def _other_numbers(read: ModuleTensors, built: ModuleTensors) -> str:
    """Numbers and flags of the model as it was read that the same model built without weights does not have; empty if
    there are none. What transformers notes about loading is private."""
    after, before = read.other_state(), built.other_state()
    changed = [
        f"{name}: {before.get(name, 'absent')} -> {value}"
        for name, value in after.items()
        if not name.endswith("name_or_path")  # where it was read
        if before.get(name, value) != value or (name not in before and not f".{name}".count("._"))
    ]
    return ", ".join(changed[:_SHOWN])


def _resolve_dtype(wanted: torch.dtype | str | None, config: Any, directory: Path) -> torch.dtype | None:
    """The floating-point type of the weights: as asked for, as configured, or as found in the checkpoint; None if that
    is not known."""
    if wanted is None or wanted == "auto":
        wanted = config.dtype
    if wanted is None:
        with suppress(CheckpointError, OSError):
            wanted = _dtype_of(checkpoint_files(directory))
    if wanted is None:
        return None
    resolved = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise InvalidArgument("dtype", wanted, 'a floating-point torch.dtype, its name, or "auto"')
    return resolved


def _dtype_of(files: tuple[Path, ...]) -> str | None:
    """What `from_pretrained` takes: the type that the index states, else that of the first floating-point tensor, by
    name, of the first file."""
    index = files[0].parent / "model.safetensors.index.json"
    if files[0].name != "model.safetensors" and index.is_file():
        stated = (json.loads(index.read_text()).get("metadata") or {}).get("dtype")
        if stated is not None:
            return str(stated).removeprefix("torch.")
    tensors = sorted(checkpoint_tensors(files[0]), key=lambda tensor: tensor.name)
    return next((_FLOATING[tensor.dtype] for tensor in tensors if tensor.dtype in _FLOATING), None)


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    shown = _progress.is_progress_bar_enabled()
    _progress.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            _progress.enable_progress_bar()
