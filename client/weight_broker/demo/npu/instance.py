"""One instance on an Ascend card in its own process, for the demo and for `ascend-check`.

It loads a model's weights into its card's memory, from a peer or from disk, and stays until the input ends. Its order
is one argument (JSON); lines on standard input are commands: `begin` loads, `digest` reads everything back from the
card. It answers with JSON lines on standard output.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from weight_broker.demo.orders import CardOrder, CardResult

if TYPE_CHECKING:
    from weight_broker import BrokerClient
    from weight_broker.demo.npu.memory import CardMemory
    from weight_broker.drivers.acl import Acl


def main(argument: str, commands: IO[str], answers: IO[str]) -> None:
    order = CardOrder(**json.loads(argument))
    from weight_broker import BrokerClient
    from weight_broker.demo.npu.memory import card_memory, checkpoint, digest

    began = time.monotonic()
    card = _open(order)
    opened = time.monotonic()
    memory = card_memory(order.framework, card, checkpoint(Path(order.model_dir)))
    spent = (opened - began, time.monotonic() - opened)
    client = BrokerClient(order.runtime_directory, name=order.name) if order.runtime_directory is not None else None
    _say(answers, {"event": "ready"})
    try:
        for command in commands:
            match command.strip():
                case "begin":
                    result = _load(order, spent, memory, client)
                    _say(answers, {"event": "done", "result": asdict(result)})
                case "digest":
                    found = digest((name, memory.content(name)) for name in memory.tensors)
                    _say(answers, {"event": "digest", "digest": found})
    finally:
        if client is not None:
            client.close()


def _open(order: CardOrder) -> int:
    """Open the card, import what every inference process imports, and return the card's index in this process."""
    from weight_broker.drivers import acl

    runtime = acl.load()
    card = _index(runtime, order.device_id)
    if order.framework == "torch_npu":
        import importlib

        importlib.import_module("torch_npu").npu.set_device(card)
    runtime.initialize()
    runtime.set_device(card)
    return card


def _index(runtime: Acl, device_id: str) -> int:
    """Neither the driver nor the device is open yet: torch_npu does both in its own way."""
    from weight_broker.memory.npu import kind as npu

    seen = [npu.device_id(runtime, index) for index in range(runtime.device_count())]
    if device_id not in seen:
        visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "not set")
        sys.exit(
            f"this process sees {', '.join(seen) or 'no card'}, not {device_id}, its card: check the container's "
            f"devices and ASCEND_RT_VISIBLE_DEVICES ({visible}), which has to ascend"
        )
    return seen.index(device_id)


def _load(order: CardOrder, spent: tuple[float, float], memory: CardMemory, client: BrokerClient | None) -> CardResult:
    from weight_broker import WeightSetKey
    from weight_broker.integrations.checkpoint import checkpoint_digest

    read_before = _disk_bytes()
    began = time.monotonic()
    facts: dict[str, Any] = {"source": "disk", "data_plane": "", "path": "read", "phases": {}, "verified": ""}
    problems: list[str] = []
    publish_seconds = 0.0
    if client is None:
        memory.load()
        ready_seconds = disk_seconds = time.monotonic() - began
        size_bytes, count = sum(_sizes(memory)), len(memory.tensors)
    else:
        directory = Path(order.model_dir)
        key = WeightSetKey(directory.name, checkpoint_digest=checkpoint_digest(directory), dtype="bfloat16")
        report = client.acquire_or_load(key, memory.tensors, memory.load, timeout=order.timeout_seconds)
        publish_seconds, disk_seconds = report.publish_seconds, report.load_seconds
        ready_seconds = time.monotonic() - began - publish_seconds
        problems = [text for text in (report.acquire_error, report.publish_error) if text]
        size_bytes, count = sum(_sizes(memory)), len(memory.tensors)
        if (acquired := report.report) is not None:
            facts = {
                "source": acquired.source_instance_name,
                "data_plane": acquired.data_plane,
                "path": acquired.path,
                "phases": dict(acquired.phases),
                "verified": str(acquired.verified or ""),
            }
            size_bytes = acquired.size_bytes
    read_after = _disk_bytes()
    return CardResult(
        name=order.name,
        device_id=order.device_id,
        size_bytes=size_bytes,
        tensor_count=count,
        open_seconds=spent[0],
        allocate_seconds=spent[1],
        ready_seconds=ready_seconds,
        disk_seconds=disk_seconds,
        publish_seconds=publish_seconds,
        disk_bytes=read_after - read_before if read_before is not None and read_after is not None else None,
        problems=problems,
        **facts,
    )


def _sizes(memory: CardMemory) -> list[int]:
    return [
        int(getattr(tensor, "storage_bytes", 0) or getattr(tensor, "nbytes", 0)) for tensor in memory.tensors.values()
    ]


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
