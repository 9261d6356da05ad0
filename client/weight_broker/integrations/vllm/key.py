"""The key of a vLLM model's weight set: everything that decides which bytes this rank holds.

The key is made before the model, because loading changes vLLM's configuration objects. Its digest of the checkpoint
does not read all of the weights (see `weight_broker.integrations.checkpoint.digest`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weight_broker.integrations.checkpoint import checkpoint_digest, checkpoint_name
from weight_broker.integrations.engine.configuration import digest, installed_version
from weight_broker.integrations.engine.directory import local_directory
from weight_broker.integrations.engine.engine import NotServable
from weight_broker.integrations.engine.options import Options
from weight_broker.integrations.vllm.ranks import parallel_rank
from weight_broker.key import Role, Stage, WeightSetKey

LOADED_LAYOUT = "vllm-loaded/1"
"""How loaded weights are laid out, under the policy `compatible`. Names, shapes and types are compared for every
acquisition; this number stands for what they do not show, the order within fused tensors, and is raised with it."""
LOADED_LAYOUT_VERSIONS = ((0, 10), (0, 33))
"""The first and the last minor version of vLLM whose layout `LOADED_LAYOUT` is."""


def weight_set_key(
    vllm_config: Any, model_config: Any, options: Options, directory: Path, files: Sequence[Path]
) -> WeightSetKey:
    """The key of this rank's weights as loading leaves them, read from these files of `directory`. Raises
    `CheckpointError`, `OSError` and `NotServable`."""
    name, revision = checkpoint_name(directory)
    quantization = getattr(model_config, "quantization", None)
    attributes = {
        "architecture": ",".join(getattr(model_config.hf_config, "architectures", None) or ()),
        "engine": _engine(options.engine_version, Stage.LOADED),
        "platform": platform_name(),
        **_overrides(model_config),
        **_experts(vllm_config),
    }
    return WeightSetKey(
        model=name,
        revision=str(getattr(model_config, "revision", None) or revision),
        checkpoint_digest=checkpoint_digest(directory, full=options.checkpoint_digest == "full", files=files),
        dtype=str(model_config.dtype).removeprefix("torch."),
        quantization=f"{quantization}:{_quantization_digest(model_config)}" if quantization else "",
        role=Role.DRAFT if is_draft(vllm_config, model_config) else Role.TARGET,
        rank=parallel_rank(vllm_config, model_config),
        engine_attributes={name: value for name, value in attributes.items() if value},
    )


def runtime_key(key: WeightSetKey, vllm_config: Any) -> WeightSetKey:
    """The key of the same weights after post-processing."""
    attributes = {
        **key.engine_attributes,
        "engine": _engine("exact", Stage.RUNTIME),
        **_runtime_attributes(vllm_config),
    }
    return dataclasses.replace(
        key, stage=Stage.RUNTIME, engine_attributes={name: value for name, value in attributes.items() if value}
    )


def is_draft(vllm_config: Any, model_config: Any) -> bool:
    """Whether the model is the draft model of speculative decoding, and not its target."""
    speculative = getattr(vllm_config, "speculative_config", None)
    return getattr(model_config, "runner_type", "") == "draft" or (
        speculative is not None and getattr(speculative, "draft_model_config", None) is model_config
    )


def checkpoint_directory(model_config: Any, load_config: Any) -> Path | None:
    """The checkpoint's directory; None if it is not on this machine yet. Raises `NotServable`."""
    model = str(model_config.model)
    elsewhere = getattr(model_config, "model_weights", "")
    if elsewhere and str(elsewhere) != model:
        raise NotServable(f"the weights are read from {elsewhere}")
    revision, cache = getattr(model_config, "revision", None), getattr(load_config, "download_dir", None)
    return local_directory(model, revision, cache)


def _engine(policy: str, stage: Stage) -> str:
    import vllm

    full = str(vllm.__version__)
    minor = ".".join(full.split(".")[:2])
    if stage is Stage.RUNTIME or policy == "exact":
        return f"vllm {full}"
    if policy == "minor":
        return f"vllm {minor}"
    first, last = LOADED_LAYOUT_VERSIONS
    try:
        known = first <= tuple(int(part) for part in minor.split(".")) <= last
    except ValueError:  # built from source without a version
        return f"vllm {full}"
    return LOADED_LAYOUT if known else f"vllm {minor}"


def platform_name() -> str:
    """The kind of device that the engine runs on, in vLLM's words."""
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


def _overrides(model_config: Any) -> dict[str, str]:
    """What the command line changes in the model's own configuration, which the checkpoint's digest covers."""
    overrides = getattr(model_config, "hf_overrides", None)
    if not overrides:
        return {}
    return {"hf_overrides": digest(overrides if isinstance(overrides, Mapping) else repr(overrides))}


def _quantization_digest(model_config: Any) -> str:
    checkpoint = getattr(model_config.hf_config, "quantization_config", None)
    if checkpoint is not None and hasattr(checkpoint, "to_dict"):
        checkpoint = checkpoint.to_dict()
    return digest([checkpoint, getattr(model_config, "quantization_config", None)])


def _experts(vllm_config: Any) -> dict[str, str]:
    """The placement of experts, if it is not the default."""
    parallel = vllm_config.parallel_config
    if not getattr(parallel, "enable_expert_parallel", False):
        return {}
    found = {}
    placement = getattr(parallel, "expert_placement_strategy", "linear")
    if placement != "linear":
        found["expert_placement"] = str(placement)
    if getattr(parallel, "enable_eplb", False):
        settings = getattr(parallel, "eplb_config", None)
        redundant = getattr(settings, "num_redundant_experts", getattr(parallel, "num_redundant_experts", 0))
        found["redundant_experts"] = str(redundant)
    return found


def _runtime_attributes(vllm_config: Any) -> dict[str, str]:
    """The attributes that decide the form of processed weights: kernels and, on an NPU, formats."""
    found = {f"version_{name}": installed_version(name) for name in ("torch", "torch_npu", "vllm_ascend")}
    kernels = getattr(vllm_config, "kernel_config", None)
    if kernels is not None:
        found["kernels"] = digest(repr(kernels))
    additional = getattr(vllm_config, "additional_config", None)
    if additional:
        found["additional_config"] = digest(additional)
    for name in ("VLLM_ASCEND_ENABLE_NZ", "VLLM_ASCEND_ENABLE_MLAPO", "ASCEND_TOOLKIT_HOME"):
        if name in os.environ:
            found[name.lower()] = os.environ[name]
    return found
