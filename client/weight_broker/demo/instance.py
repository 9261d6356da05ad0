"""One instance of the demo in its own process: load a model, run it once, stay until the input ends.

Its order is one argument (JSON). A line on standard input lets it begin; the end of that input ends it, so that it
never outlives the demo. It answers with JSON lines on standard output.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from weight_broker.demo.orders import Order, Result

PROMPT_TOKENS = 16


def main(argument: str, commands: IO[str], answers: IO[str]) -> None:
    order = Order(**json.loads(argument))
    started = time.monotonic()
    _import_everything(order.model_dir)
    _say(answers, {"event": "ready", "import_seconds": time.monotonic() - started})
    if not commands.readline():
        return
    from weight_broker import BrokerClient

    client = None
    if order.runtime_directory is not None:
        client = BrokerClient(order.runtime_directory, name=order.name)
    try:
        # The model stays in this frame: it is what the instance would serve with.
        model, result = _load(order, client)
        _say(answers, {"event": "done", "result": asdict(result)})
        commands.read()
        del model
    finally:
        if client is not None:
            client.close()


def _import_everything(model_dir: str) -> None:
    """Import what every inference process imports, so that the times below are of loading weights only."""
    import torch
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    import weight_broker.integrations.transformers  # noqa: F401

    # One thread in every instance: how many there are can change the last bits of a sum.
    torch.set_num_threads(1)
    configuration = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    MODEL_FOR_CAUSAL_LM_MAPPING[type(configuration)]


def _load(order: Order, client: Any) -> tuple[Any, Result]:
    import torch

    from weight_broker.integrations.transformers import load_causal_lm

    read_before = _disk_bytes()
    model, report = load_causal_lm(
        order.model_dir, client, zero_copy=order.zero_copy, timeout=order.timeout_seconds, publish=client is not None
    )
    read_after = _disk_bytes()
    tokens = torch.arange(1, PROMPT_TOKENS + 1)[None] % model.config.get_text_config().vocab_size
    started = time.monotonic()
    with torch.inference_mode():
        logits = model(tokens).logits.contiguous()
    forward_seconds = time.monotonic() - started
    problems = [text for text in (report.acquire_error, report.publish_error) if text]
    if not torch.isfinite(logits).all() or logits.float().std().item() == 0.0:
        problems.append("the logits are not finite or all equal")
    acquired = report.report
    weights = {tensor.data_ptr(): tensor.nbytes for tensor in model.parameters()}
    return model, Result(
        name=order.name,
        source=acquired.source_instance_name if acquired is not None else "disk",
        path=acquired.path if acquired is not None else "read",
        size_bytes=acquired.size_bytes if acquired is not None else sum(weights.values()),
        ready_seconds=report.seconds - report.publish_seconds,
        disk_seconds=report.load_seconds,
        phases=dict(acquired.phases) if acquired is not None else {},
        publish_seconds=report.publish_seconds,
        forward_seconds=forward_seconds,
        disk_bytes=read_after - read_before if read_before is not None and read_after is not None else None,
        logits_digest=hashlib.sha256(logits.view(torch.uint8).numpy().tobytes()).hexdigest(),
        verified=str(acquired.verified or "") if acquired is not None else "",
        problems=problems,
    )


def _disk_bytes() -> int | None:
    """Bytes that the kernel read from a disk for this process so far."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
        return next(int(line.partition(":")[2]) for line in lines if line.startswith("read_bytes:"))
    except (OSError, StopIteration):
        return None


def _say(answers: IO[str], message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    # Libraries print to standard error; standard output carries the answers alone.
    private = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    main(sys.argv[1], sys.stdin, private)
