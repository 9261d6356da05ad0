"""The key of a SGLang model's weight set: everything that decides which bytes this rank holds.

The key is made before the model. Its digest of the checkpoint does not read all of the weights (see
`weight_broker.integrations.checkpoint.digest`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weight_broker.integrations.checkpoint import checkpoint_digest, checkpoint_name
from weight_broker.integrations.engine.configuration import digest
from weight_broker.integrations.engine.options import Options
from weight_broker.integrations.sglang.ranks import attention_ranks, parallel_rank, server_arguments
from weight_broker.key import Role, WeightSetKey

_ARGUMENTS = (
    "cpu_offload_gb",
    "disable_shared_experts_fusion",
    "enable_dp_lm_head",
    "ep_num_redundant_experts",
    "fp4_gemm_runner_backend",
    "fp8_gemm_runner_backend",
    "init_expert_location",
    "moe_a2a_backend",
    "moe_dense_tp_size",
    "moe_runner_backend",
    "torchao_config",
)
"""Arguments of the server that decide what a rank holds and in which order."""
_USUAL = (None, False, 0, "", "auto", "none", "trivial")


def weight_set_key(
    model_config: Any, options: Options, directory: Path, platform: str, load_config: Any, files: Sequence[Path]
) -> WeightSetKey:
    """The key of this rank's weights as loading leaves them, read from these files of `directory`. Raises
    `CheckpointError` and `OSError`."""
    name, revision = checkpoint_name(directory)
    quantization = getattr(model_config, "quantization", None)
    attributes = {
        "architecture": ",".join(getattr(model_config.hf_config, "architectures", None) or ()),
        "engine": _engine(options.engine_version),
        "platform": platform,
        "attention_ranks": attention_ranks(),
        **_overrides(model_config),
        **_arguments(),
    }
    index = getattr(load_config, "draft_model_idx", None)
    if index is not None:
        attributes["draft_model_index"] = str(index)
    return WeightSetKey(
        model=name,
        revision=str(getattr(model_config, "revision", None) or revision),
        checkpoint_digest=checkpoint_digest(directory, full=options.checkpoint_digest == "full", files=files),
        dtype=str(model_config.dtype).removeprefix("torch."),
        quantization=f"{quantization}:{_quantization_digest(model_config)}" if quantization else "",
        role=Role.DRAFT if getattr(model_config, "is_draft_model", False) else Role.TARGET,
        rank=parallel_rank(model_config),
        engine_attributes={name: value for name, value in attributes.items() if value},
    )


def _engine(policy: str) -> str:
    """No two versions are known to lay weights out alike: sharing between them has to be asked for (`minor`)."""
    from sglang.version import __version__

    full = str(__version__)
    return f"sglang {'.'.join(full.split('.')[:2]) if policy == 'minor' else full}"


def _overrides(model_config: Any) -> dict[str, str]:
    overrides = getattr(model_config, "model_override_args", None)
    return {"model_override_args": digest(overrides)} if overrides else {}


def _arguments() -> dict[str, str]:
    arguments = server_arguments()
    values = {name: getattr(arguments, name, None) for name in _ARGUMENTS}
    return {name: str(value) for name, value in values.items() if value not in _USUAL}


def _quantization_digest(model_config: Any) -> str:
    checkpoint = getattr(model_config.hf_config, "quantization_config", None)
    if checkpoint is not None and hasattr(checkpoint, "to_dict"):
        checkpoint = checkpoint.to_dict()
    return digest(checkpoint)
