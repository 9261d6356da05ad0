"""The memory of this process: describe tensors, copy them into sealed host memory (`export`), out of it (`copy_in`), or
map it (`map_tensors`). What a kind of memory can do: `weight_broker.memory.kind`."""

from weight_broker.memory.described import DescribedTensor, DescribedTensors
from weight_broker.memory.digest_mode import DigestMode
from weight_broker.memory.host.export import HostRegion, export
from weight_broker.memory.host.fill import CopyResult, copy_in
from weight_broker.memory.host.view import map_tensors
from weight_broker.memory.tensors import describe

__all__ = [
    "CopyResult",
    "DescribedTensor",
    "DescribedTensors",
    "DigestMode",
    "HostRegion",
    "copy_in",
    "describe",
    "export",
    "map_tensors",
]
