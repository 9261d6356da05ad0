"""A real vLLM engine in a process of its own: loads, generates, prints what it got as one line of JSON.

Run as `python -m support.vllm_engine '{"model": …}'`. The digest covers token ids and log probabilities, so that equal
digests mean identical answers; they can be compared between runs with the same data type and number of ranks only.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from typing import Any

MARK = "VLLM-ENGINE-RESULT "
PROMPTS = ([1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11])


def main() -> None:
    """Loads and generates as the JSON in the first argument says; waits for a line on standard input at the end if it
    says `hold`."""
    began = float(os.environ.get("VLLM_ENGINE_BEGAN", time.time()))
    options: dict[str, Any] = json.loads(sys.argv[1])
    hold, tokens, calls = options.pop("hold", False), options.pop("tokens", 8), options.pop("calls", [])
    before = options.pop("before", "")
    if before:
        exec(before)  # what a test wants to be different in this process
    from vllm import LLM, SamplingParams

    load_seconds = _time_loads()
    defaults = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "dtype": "bfloat16",
        "max_model_len": 256,
        "max_num_seqs": 4,
        "seed": 0,
    }
    imported = time.time()
    engine = LLM(**{**defaults, **options})
    ready = time.time()
    sampling = SamplingParams(temperature=0, max_tokens=tokens, detokenize=False, logprobs=5, ignore_eos=True)

    def generate(params: Any = sampling) -> str:
        answers = engine.generate([{"prompt_token_ids": one} for one in PROMPTS], params, use_tqdm=False)
        rows = []
        for answer in answers:
            output = answer.outputs[0]
            chances = [
                sorted((token, round(one.logprob, 6)) for token, one in position.items())
                for position in output.logprobs
            ]
            rows.append((list(output.token_ids), chances))
        return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]

    engine.generate([{"prompt_token_ids": [1]}], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    first_token = time.time()
    result: dict[str, Any] = {
        "digest": generate(),
        "import_seconds": imported - began,
        "engine_seconds": ready - imported,
        "first_token_seconds": first_token - began,
        "load_seconds": sum(load_seconds),
        "reports": engine.collective_rpc(_reports) if options.get("load_format") == "weight_broker" else [],
    }
    result["calls"] = [_call(engine, generate, call) for call in calls]
    print(MARK + json.dumps(result), flush=True)
    if hold:
        sys.stdin.readline()


def _time_loads() -> list[float]:
    """Notes how long each model takes to load in this process: making it, its weights, post-processing, publishing."""
    from vllm.model_executor import model_loader

    seconds: list[float] = []
    original = model_loader.get_model_loader

    def get_model_loader(load_config: Any) -> Any:
        loader = original(load_config)
        load_model = loader.load_model

        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.monotonic()
            model = load_model(*args, **kwargs)
            seconds.append(time.monotonic() - begun)
            return model

        loader.load_model = timed
        return loader

    module: Any = model_loader
    module.get_model_loader = get_model_loader
    return seconds


def _call(engine: Any, generate: Any, call: str) -> Any:
    if call == "generate":
        return generate()
    if call == "reports":
        return engine.collective_rpc(_reports)
    name, _, argument = call.partition(" ")
    if name in ("scribble", "load_weights"):
        return engine.collective_rpc(_scribble if name == "scribble" else _load_nothing)
    if name == "retract":
        return engine.collective_rpc(_retract, args=(int(argument),))
    return repr(engine.collective_rpc(name, args=tuple(json.loads(argument)) if argument else ()))


def _reports(worker: Any) -> list[dict[str, Any]]:
    """Runs in each worker."""
    from weight_broker.integrations.vllm import reports

    return [report.as_dict() for report in reports()]


def _scribble(worker: Any) -> None:
    """Runs in each worker: changes one value of one weight."""
    import torch

    with torch.no_grad():
        next(worker.get_model().parameters()).view(-1)[0] += 1


def _load_nothing(worker: Any) -> None:
    """Runs in each worker: loads no weight at all."""
    worker.get_model().load_weights([])


def _retract(worker: Any, rank: int) -> int:
    """Runs in each worker; one of them retracts."""
    from weight_broker.integrations.vllm import retract

    return retract("the test says so") if worker.rank == rank else 0


if __name__ == "__main__":
    main()
