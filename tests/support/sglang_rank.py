"""One rank of a SGLang engine, as far as its scheduler's model: command line, process groups, loader, model, weights.

Run as `python -m support.sglang_rank '{"arguments": […]}'`. It does what SGLang's model runner does before kernels come
in, prints what it got as one line of JSON, and then does what the lines on standard input say. The digest covers every
parameter and buffer, so that equal digests mean the same model.
"""

from __future__ import annotations

import hashlib
import json
import sys
import types
from typing import Any

MARK = "SGLANG-RANK-RESULT "


def main() -> None:
    """Loads as the JSON in the first argument says: `arguments` of the server, `rank` and `port` of the tensor group,
    `before`: what a test wants to be different in this process."""
    options: dict[str, Any] = json.loads(sys.argv[1])
    exec(options.get("before", ""))
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt import runtime_context
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import parallel_state
    from sglang.srt.model_loader import get_model
    from sglang.srt.server_args import prepare_server_args

    arguments = prepare_server_args([*options["arguments"], "--device", "cpu", "--skip-tokenizer-init"])
    rank, size = options.get("rank", 0), arguments.tp_size
    runtime_context.publish(arguments, role="scheduler", ranks=runtime_context.SpawnRanks(world_rank=rank))
    parallel_state.init_distributed_environment(
        world_size=size,
        rank=rank,
        local_rank=rank,
        distributed_init_method=f"tcp://127.0.0.1:{options['port']}",
        backend="gloo",
    )
    parallel_state.initialize_model_parallel(backend="gloo")
    config = LoadConfig(
        load_format=arguments.load_format,
        download_dir=arguments.download_dir,
        model_loader_extra_config=arguments.model_loader_extra_config,
        tp_rank=rank,
    )
    model = get_model(
        model_config=ModelConfig.from_server_args(arguments),
        load_config=config,
        device_config=DeviceConfig("cpu", 0),
    )
    _say(model)
    for line in sys.stdin:
        _do(line.strip(), model)
        _say(model)


def _do(action: str, model: Any) -> None:
    import torch
    from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager

    module: Any = torch
    module.get_device_module = lambda *_device: torch.cpu  # a build for CUDA would look for a GPU
    manager: Any = SchedulerWeightUpdaterManager
    request = types.SimpleNamespace(tags=["weights"])
    match action:
        case "release":
            manager.release_memory_occupation(_scheduler_of(model), request)
        case "resume":
            manager.resume_memory_occupation(_scheduler_of(model), request)
        case "update":  # left before it touches what a scheduler would have
            _until_it_needs_a_scheduler(lambda: manager.update_weights_from_disk(None, request))
        case "load_weights":
            model.load_weights([])
        case "scribble":
            with torch.no_grad():
                next(model.parameters()).view(-1)[0] += 1
        case _:
            raise ValueError(action)


def _scheduler_of(model: Any) -> Any:
    """What the engine's own methods for releasing memory ask of a scheduler whose memory saver is off."""
    if model not in _schedulers:
        _schedulers[model] = types.SimpleNamespace(
            scheduler=None,
            is_fully_idle=lambda **_options: True,
            offload_tags=set(),
            memory_saver_adapter=types.SimpleNamespace(pause=lambda _tag: None, resume=lambda _tag: None),
            tp_worker=types.SimpleNamespace(model_runner=types.SimpleNamespace(model=model)),
            tp_cpu_group=None,
            _assert_weight_cache_inactive=lambda _operation: None,
        )
    return _schedulers[model]


_schedulers: dict[Any, Any] = {}


def _until_it_needs_a_scheduler(call: Any) -> None:
    try:
        call()
    except AttributeError:
        return
    raise AssertionError("this SGLang does without a scheduler")


def _say(model: Any) -> None:
    import torch

    from weight_broker.integrations.sglang import reports

    digest = hashlib.sha256()
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    found = {"digest": digest.hexdigest()[:16], "reports": [report.as_dict() for report in reports()]}
    print(MARK + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
