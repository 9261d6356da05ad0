"""Which rank of which engine this process is."""

from __future__ import annotations

import hashlib
import os
from typing import Any

from weight_broker.integrations.engine.configuration import has_experts
from weight_broker.key import ParallelRank


def server_arguments() -> Any:
    """The arguments of the server, as this version of SGLang hands them out; None if it has none."""
    from sglang.srt import server_args

    try:
        from sglang.srt.runtime_context import get_server_args
    except ImportError:
        get_server_args = server_args.get_global_server_args
    try:
        return get_server_args()
    except (RuntimeError, ValueError, AssertionError, LookupError):  # a loader that is used by itself
        return None


def parallel_rank(model_config: Any) -> ParallelRank:
    """The rank within its groups, as far as it decides what a rank holds. Replicas (`--dp-size` without attention that
    is data parallel) count as separate engines and hold the same weights."""
    from sglang.srt.distributed import parallel_state

    tensor, pipeline = parallel_state.get_tp_group(), parallel_state.get_pp_group()
    found = {
        "tensor_parallel_rank": tensor.rank_in_group,
        "tensor_parallel_size": tensor.world_size,
        "pipeline_parallel_rank": pipeline.rank_in_group,
        "pipeline_parallel_size": pipeline.world_size,
    }
    if has_experts(model_config):
        experts = parallel_state.get_moe_ep_group()
        if experts.world_size > 1:
            found |= {"expert_parallel_rank": experts.rank_in_group, "expert_parallel_size": experts.world_size}
    return ParallelRank(**found)


def attention_ranks() -> str:
    """How many ranks attention is spread over, if those are fewer than the tensor group has (attention that is data
    parallel)."""
    from sglang.srt.distributed import parallel_state

    size = parallel_state.get_attn_tp_group().world_size
    return "" if size == parallel_state.get_tp_group().world_size else str(size)


def engine_ranks(model: str, role: str) -> tuple[str, int, int] | None:
    """The engine that this process is a rank of (see `Engine.ranks`)."""
    from sglang.srt.distributed import parallel_state

    tensor, pipeline = parallel_state.get_tp_group(), parallel_state.get_pp_group()
    size = tensor.world_size * pipeline.world_size
    member = pipeline.rank_in_group * tensor.world_size + tensor.rank_in_group
    hosts = int(getattr(server_arguments(), "nnodes", 1) or 1)
    if hosts > 1:  # a broker speaks for its own host
        size, member = size // hosts, member % max(size // hosts, 1)
    if size < 2:
        return None
    parts = [model, role, _meeting_point()]
    if not getattr(server_arguments(), "use_ray", False):
        parts.append(str(os.getppid()))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32], member, size


def _meeting_point() -> str:
    """Where the ranks of this engine met: a port that no other engine of this host has."""
    from torch import distributed

    module: Any = distributed
    store = module.distributed_c10d._get_default_store()
    while isinstance(store, module.PrefixStore):
        store = store.underlying_store
    return f"{store.host}:{store.port}" if isinstance(store, module.TCPStore) else ""
