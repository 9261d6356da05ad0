"""A process with tensors of torch_npu on card 0: prints what the product makes of them, as JSON."""

from __future__ import annotations

import importlib
import json
from typing import Any

from weight_broker.errors import BrokerError
from weight_broker.memory.npu import kind
from weight_broker.memory.npu import torch as npu_torch

_NZ = 29
_NZ_SHAPES = ((3, 5, "float16"), (64, 48, "int8"))


def main() -> None:
    """The last line is the answer."""
    print(json.dumps(_looked_at()), flush=True)


def _looked_at() -> dict[str, Any]:
    tensors = _tensors()
    described = [npu_torch.from_tensor(name, tensor) for name, tensor in tensors.items()]
    segments = npu_torch.segments(0)
    shared, words = _shared(tensors)
    inside = [
        any(segment.base <= one.address and one.address + one.storage_bytes <= segment.end for segment in segments)
        for one in described
    ]
    whole = [
        one.storage_bytes >= tensor.numel() * tensor.element_size()
        for one, tensor in zip(described, tensors.values(), strict=True)
    ]
    formats = {name: int(_torch_npu().get_npu_format(tensor)) for name, tensor in tensors.items()}
    sizes = {name: one.storage_bytes for name, one in zip(tensors, described, strict=True)}
    details = {"formats": formats, "storage bytes": sizes, "segments": _snapshot(), "regions": words}
    return {"whole": all(whole), "inside": all(inside), "shared": shared, "details": details}


def _tensors() -> dict[str, Any]:
    torch = importlib.import_module("torch")
    device = "npu:0"
    found = {"plain": torch.ones(1 << 20, dtype=torch.float16, device=device)}
    for rows, columns, dtype in _NZ_SHAPES:
        tensor = torch.ones(rows, columns, dtype=getattr(torch, dtype), device=device)
        found[f"nz {dtype}"] = _torch_npu().npu_format_cast(tensor, _NZ)
    return found


def _shared(tensors: dict[str, Any]) -> tuple[bool, str]:
    """Whether the product shares them, and as what; or its words."""
    try:
        exported = kind.export_segments(kind.describe_device(tensors), any_process=True)
    except BrokerError as error:
        return False, error.message
    return True, ", ".join(f"{region.WhichOneof('handle')} {region.size_bytes}" for region in exported.regions)


def _snapshot() -> list[dict[str, Any]]:
    names = "address", "total_size", "segment_type", "is_expandable", "segment_pool_id"
    return [{name: row.get(name) for name in names} for row in _torch_npu().npu.memory_snapshot()]


def _torch_npu() -> Any:
    return importlib.import_module("torch_npu")


if __name__ == "__main__":
    main()
