"""Which rank of which engine this process is."""

from __future__ import annotations

import hashlib
import os
from typing import Any

from weight_broker.integrations.engine.configuration import has_experts
from weight_broker.key import ParallelRank


def parallel_rank(vllm_config: Any, model_config: Any) -> ParallelRank:
    """The rank within its groups, as far as it decides what a rank holds: replicas of a dense model under data
    parallelism hold the same weights, those of a mixture of experts need not; experts are only spread where that is
    asked for."""
    from vllm.distributed import parallel_state

    tensor, pipeline = parallel_state.get_tp_group(), parallel_state.get_pp_group()
    found = {
        "tensor_parallel_rank": tensor.rank_in_group,
        "tensor_parallel_size": tensor.world_size,
        "pipeline_parallel_rank": pipeline.rank_in_group,
        "pipeline_parallel_size": pipeline.world_size,
    }
    if has_experts(model_config):
        data = parallel_state.get_dp_group()
        found |= {"data_parallel_rank": data.rank_in_group, "data_parallel_size": data.world_size}
        if getattr(vllm_config.parallel_config, "enable_expert_parallel", False):
            experts = parallel_state.get_ep_group()
            found |= {"expert_parallel_rank": experts.rank_in_group, "expert_parallel_size": experts.world_size}
    return ParallelRank(**found)


def engine_ranks(vllm_config: Any, model: str, role: str) -> tuple[str, int, int] | None:
    """The engine that this process is a rank of (see `Engine.ranks`)."""
    from vllm.distributed import parallel_state

    parallel = vllm_config.parallel_config
    tensor, pipeline = parallel_state.get_tp_group(), parallel_state.get_pp_group()
    size = tensor.world_size * pipeline.world_size
    member = pipeline.rank_in_group * tensor.world_size + tensor.rank_in_group
    hosts = parallel_state.get_node_count() if hasattr(parallel_state, "get_node_count") else 1
    if hosts > 1:  # a broker speaks for its own host
        size, member = size // hosts, member % max(size // hosts, 1)
    if size < 2:
        return None
    backend = str(getattr(parallel, "distributed_executor_backend", "") or "")
    parts = [model, role, str(getattr(parallel, "data_parallel_rank", 0))]
    if backend == "external_launcher":  # every rank has made its own configuration
        parts += [os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")]
    else:
        parts.append(str(vllm_config.instance_id))
    if backend != "ray":
        parts.append(str(os.getppid()))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32], member, size
