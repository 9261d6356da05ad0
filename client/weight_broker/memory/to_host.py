"""Publishing a copy in host memory, also of tensors in device memory."""

from __future__ import annotations

from collections.abc import Sequence

from weight_broker.drivers.error import DriverError
from weight_broker.errors import PublishRefused
from weight_broker.memory.described import DescribedTensor, DescribedTensors
from weight_broker.memory.kind import DeadlinePassed, HostCopies, Shared, Terms, kind_of


def share_copy(tensors: DescribedTensors, terms: Terms, deadline: float) -> Shared:
    """A sealed copy of the tensors: they may change and be freed afterwards. Raises `PublishRefused`; nothing is left
    behind then."""
    kind = kind_of(tensors.device_kind)
    try:
        copies = kind.host_copies(tensors)
        if copies is None:
            return kind.share(tensors, terms, deadline)
        return _copied(tensors, copies, terms, deadline)
    except DeadlinePassed as error:
        raise PublishRefused("the deadline passed while the tensors were copied to host memory") from error
    except DriverError as error:
        raise PublishRefused(f"the driver does not copy the tensors to host memory: {error}") from error


def with_gaps(tensors: DescribedTensors) -> DescribedTensor | None:
    """A tensor whose memory has gaps, which no plain copy passes over."""
    return next((tensor for tensor in tensors.tensors if not tensor.spec.is_dense), None)


def _copied(tensors: DescribedTensors, copies: HostCopies, terms: Terms, deadline: float) -> Shared:
    from weight_broker.memory.host.export import SharedWeights, export_copy

    if (gaps := with_gaps(tensors)) is not None:
        raise PublishRefused(
            f"tensor {gaps.spec.name!r} has gaps between its elements, and device memory is copied to host memory "
            "without looking at them; make it contiguous"
        )

    def copy(addresses: Sequence[int]) -> None:
        copies.to_host(
            [
                (address, tensor.address, tensor.spec.content_bytes)
                for address, tensor in zip(addresses, tensors.tensors, strict=True)
            ],
            deadline,
        )

    region = export_copy(tensors.layout, copy, digest_mode=terms.digest_mode, deadline=deadline)
    return SharedWeights(tensors.layout, [(region.fd, region.size_bytes)], region.placements, region.digests)
