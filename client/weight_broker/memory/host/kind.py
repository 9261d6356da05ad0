"""Host memory as a kind: tensors are copied into a sealed memfd to be read, and out of the source's to be filled."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

from weight_broker.digest import (
    FULL_BLOCK_BYTES,
    GLANCE_BLOCK_BYTES,
    SAMPLE_BLOCK_BYTES,
    ContentDigests,
    DigestAlgorithm,
    DigestCoverage,
    is_available,
)
from weight_broker.layout import Layout, TensorSpec
from weight_broker.memory.described import DescribedTensors
from weight_broker.memory.host import copying, strided
from weight_broker.memory.host.describe import describe_host
from weight_broker.memory.host.destination import TensorFiller
from weight_broker.memory.host.export import SharedWeights, export, region_bytes
from weight_broker.memory.host.touchable import require_writable
from weight_broker.memory.kind import Destination, Kind, Prepared, Shared, Terms


class HostKind:
    """A `weight_broker.memory.kind.Kind`."""

    def describe(self, tensors: Mapping[str, object]) -> DescribedTensors:
        """Torch tensors and NumPy arrays."""
        return describe_host(tensors)

    def share(
        self, tensors: DescribedTensors, terms: Terms, deadline: float, prepared: Prepared | None = None
    ) -> Shared:
        """Copies the tensors: they may change and be freed afterwards."""
        region = export(tensors, digest_mode=terms.digest_mode, deadline=deadline, prepared=prepared)
        return SharedWeights(tensors.layout, [(region.fd, region.size_bytes)], region.placements, region.digests)

    def prepared_bytes(self, layout: Layout) -> int:
        """Size of the copy."""
        return region_bytes(layout)

    def destination(self, tensors: DescribedTensors, terms: Terms) -> Destination:
        """Filled by this process. Raises `InvalidArgument` for a tensor that cannot be written."""
        require_writable(tensors)
        return TensorFiller(tensors, terms.digest_mode)

    def digests(
        self, tensors: DescribedTensors, deadline: float | None = None, *, sampled: bool = False
    ) -> ContentDigests:
        """Every byte, or a sample if xxhash is not installed."""
        tensors.require_host_memory()
        packed = _packed(tensors)
        contents = [
            (ctypes.addressof(packed[index]) if index in packed else tensor.address, _own_bytes(tensor.spec))
            for index, tensor in enumerate(tensors.tensors)
        ]
        if sampled or not is_available(DigestAlgorithm.XXH3_64):
            algorithm = DigestAlgorithm.CRC32
            block_bytes = GLANCE_BLOCK_BYTES if sampled else SAMPLE_BLOCK_BYTES
            values = copying.digest_samples(contents, algorithm, block_bytes, deadline=deadline)
            return ContentDigests(algorithm, DigestCoverage.SAMPLED, block_bytes, tuple(values))
        full = DigestAlgorithm.XXH3_64
        found = copying.digest_all(contents, full, FULL_BLOCK_BYTES, deadline=deadline)
        return ContentDigests(full, DigestCoverage.FULL, FULL_BLOCK_BYTES, tuple(found))

    def host_copies(self, tensors: DescribedTensors) -> None:
        """The tensors are in host memory."""


def _packed(tensors: DescribedTensors) -> dict[int, ctypes.Array[ctypes.c_char]]:
    """Copies of the tensors that have gaps, without the gaps, by index."""
    packed: dict[int, ctypes.Array[ctypes.c_char]] = {}
    for index, tensor in enumerate(tensors.tensors):
        spec = tensor.spec
        if spec.is_dense or spec.alias_of or not spec.content_bytes:
            continue
        packed[index] = ctypes.create_string_buffer(spec.content_bytes)
        strided.pack(spec, tensor.address, ctypes.addressof(packed[index]), tensor.framework)
    return packed


def _own_bytes(spec: TensorSpec) -> int:
    """0 for an alias."""
    return 0 if spec.alias_of else spec.content_bytes


KIND: Kind[DescribedTensors] = HostKind()
