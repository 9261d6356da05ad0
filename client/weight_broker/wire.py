"""Translation between the domain types and the wire's messages, in both directions, with the wire's values checked.

Client and broker use it. Every value from the wire is validated here; a wrong value raises `InvalidArgument` with the
field.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable
from dataclasses import fields
from typing import cast

from weight_broker.digest import ContentDigests, DigestAlgorithm, DigestCoverage
from weight_broker.errors import InvalidArgument
from weight_broker.key import ParallelRank, Role, Stage, WeightSetKey
from weight_broker.kinds import TRAITS
from weight_broker.layout import Layout, MemoryFormat, TensorSpec
from weight_broker.load_group import LoadGroup
from weight_broker.v1 import resources_pb2
from weight_broker.v1 import weight_set_pb2 as pb

TOKEN_METADATA_KEY = "weight-broker-session-bin"
MAX_REASON_CHARACTERS = 1024
"""Longest reason or detail that a report carries."""

DEVICE_KINDS: dict[str, pb.DeviceKind.ValueType] = {
    name: cast("pb.DeviceKind.ValueType", traits.wire_number) for name, traits in TRAITS.items()
}
"""Kinds of memory by their names."""

_ROLES = {pb.ROLE_TARGET: Role.TARGET, pb.ROLE_DRAFT: Role.DRAFT}
_STAGES = {pb.STAGE_LOADED: Stage.LOADED, pb.STAGE_RUNTIME: Stage.RUNTIME}
_FORMATS = {
    pb.MEMORY_FORMAT_STRIDED: MemoryFormat.STRIDED,
    pb.MEMORY_FORMAT_FRACTAL_NZ: MemoryFormat.FRACTAL_NZ,
    pb.MEMORY_FORMAT_FRACTAL_NZ_C0_16: MemoryFormat.FRACTAL_NZ_C0_16,
    pb.MEMORY_FORMAT_FRACTAL_NZ_C0_32: MemoryFormat.FRACTAL_NZ_C0_32,
    pb.MEMORY_FORMAT_FRACTAL_NZ_C0_2: MemoryFormat.FRACTAL_NZ_C0_2,
    pb.MEMORY_FORMAT_FRACTAL_NZ_C0_4: MemoryFormat.FRACTAL_NZ_C0_4,
    pb.MEMORY_FORMAT_FRACTAL_NZ_C0_8: MemoryFormat.FRACTAL_NZ_C0_8,
}
_ALGORITHMS = {
    pb.DIGEST_ALGORITHM_XXH3_64: DigestAlgorithm.XXH3_64,
    pb.DIGEST_ALGORITHM_CRC32: DigestAlgorithm.CRC32,
    pb.DIGEST_ALGORITHM_MULTILINEAR_64: DigestAlgorithm.MULTILINEAR_64,
}
_COVERAGES = {
    pb.DIGEST_COVERAGE_FULL: DigestCoverage.FULL,
    pb.DIGEST_COVERAGE_SAMPLED: DigestCoverage.SAMPLED,
}
_ROLE_VALUES = {role: value for value, role in _ROLES.items()}
_STAGE_VALUES = {stage: value for value, stage in _STAGES.items()}
_FORMAT_VALUES = {format_: value for value, format_ in _FORMATS.items()}
_ALGORITHM_VALUES = {algorithm: value for value, algorithm in _ALGORITHMS.items()}
_COVERAGE_VALUES = {coverage: value for value, coverage in _COVERAGES.items()}

_KEPT_TENSORS = 20_000
_last_layout: tuple[weakref.ref[Layout], bytes] | None = None
"""The last translated layout and its message: the same layout is often translated many times in a row."""


def device_kind_to_wire(kind: str) -> pb.DeviceKind.ValueType:
    return cast("pb.DeviceKind.ValueType", TRAITS[kind].wire_number)


def load_group_to_wire(group: LoadGroup) -> pb.LoadGroup:
    return pb.LoadGroup(group_id=group.group_id, member=group.member, size=group.size)


def key_to_wire(key: WeightSetKey) -> pb.WeightSetKey:
    return pb.WeightSetKey(
        model=key.model,
        revision=key.revision,
        checkpoint_digest=key.checkpoint_digest,
        dtype=key.dtype,
        quantization=key.quantization,
        role=_ROLE_VALUES[key.role],
        stage=_STAGE_VALUES[key.stage],
        rank=pb.ParallelRank(**{item.name: getattr(key.rank, item.name) for item in fields(key.rank)}),
        engine_attributes=[pb.EngineAttribute(name=name, value=value) for name, value in key.engine_attributes.items()],
    )


def key_from_wire(message: pb.WeightSetKey) -> WeightSetKey:
    """Raises `InvalidArgument`."""
    role, stage = _ROLES.get(message.role), _STAGES.get(message.stage)
    if role is None:
        raise InvalidArgument("key.role", message.role, "ROLE_TARGET or ROLE_DRAFT")
    if stage is None:
        raise InvalidArgument("key.stage", message.stage, "STAGE_LOADED or STAGE_RUNTIME")
    attributes: dict[str, str] = {}
    for attribute in message.engine_attributes:
        if attribute.name in attributes:
            raise InvalidArgument("key.engine_attributes", attribute.name, "names that occur once")
        attributes[attribute.name] = attribute.value
    return WeightSetKey(
        model=message.model,
        revision=message.revision,
        checkpoint_digest=message.checkpoint_digest,
        dtype=message.dtype,
        quantization=message.quantization,
        role=role,
        stage=stage,
        rank=ParallelRank(**{item.name: getattr(message.rank, item.name) for item in fields(ParallelRank)}),
        engine_attributes=attributes,
    )


def layout_to_wire(layout: Layout, message: pb.Layout | None = None) -> pb.Layout:
    """`message`: an empty message to write to."""
    global _last_layout
    if message is None:
        message = pb.Layout()
    last = _last_layout
    if last is not None and last[0]() is layout:
        message.MergeFromString(last[1])
        return message
    message.fingerprint = layout.fingerprint
    tensors_to_wire(layout.tensors, message)
    if len(layout) <= _KEPT_TENSORS:
        _last_layout = (weakref.ref(layout), message.SerializeToString())
    return message


def tensors_to_wire(tensors: Iterable[TensorSpec], message: pb.Layout) -> None:
    """Adds tensors to a message."""
    add = message.tensors.add
    for name, dtype, shape, stride, storage_bytes, storage_offset, memory_format, alias_of in tensors:
        # Assignments take less time than a call with keywords, and every acquire runs this.
        tensor = add()
        tensor.name = name
        tensor.dtype = dtype
        tensor.shape.extend(shape)
        tensor.stride.extend(stride)
        tensor.storage_bytes = storage_bytes
        tensor.memory_format = _FORMAT_VALUES[memory_format]
        if storage_offset:
            tensor.storage_offset = storage_offset
        if alias_of:
            tensor.alias_of = alias_of


def layout_from_wire(message: pb.Layout) -> Layout:
    """Raises `InvalidArgument`, also for an order or a fingerprint that is not canonical."""
    specs = specs_from_wire(message)
    layout = Layout(specs)
    if list(layout.tensors) != specs:
        raise InvalidArgument("layout.tensors", "not sorted", "tensors sorted by name")
    check_fingerprint(layout, message.fingerprint)
    return layout


def specs_from_wire(message: pb.Layout) -> list[TensorSpec]:
    """The tensors of a layout, or of a part of one, unchecked. Raises `InvalidArgument` for an unknown format."""
    specs: list[TensorSpec] = []
    for tensor in message.tensors:
        memory_format = _FORMATS.get(tensor.memory_format)
        if memory_format is None:
            raise InvalidArgument(
                f"layout.tensors[{tensor.name}].memory_format", tensor.memory_format, "a known memory format"
            )
        specs.append(
            TensorSpec(
                tensor.name,
                tensor.dtype,
                tuple(tensor.shape),
                tuple(tensor.stride),
                tensor.storage_bytes,
                tensor.storage_offset,
                memory_format,
                tensor.alias_of,
            )
        )
    return specs


def check_fingerprint(layout: Layout, fingerprint: str) -> None:
    """Raises `InvalidArgument` if the sender computed another one."""
    if fingerprint != layout.fingerprint:
        raise InvalidArgument("layout.fingerprint", fingerprint, f"{layout.fingerprint}, from the tensors")


def digests_to_wire(digests: ContentDigests) -> pb.ContentDigests:
    return pb.ContentDigests(
        algorithm=_ALGORITHM_VALUES[digests.algorithm],
        coverage=_COVERAGE_VALUES[digests.coverage],
        block_bytes=digests.block_bytes,
        values=digests.values,
    )


def digests_from_wire(
    messages: Iterable[pb.ContentDigests], tensor_count: int, *, pass_over_unknown: bool = False
) -> tuple[ContentDigests, ...]:
    """Raises `InvalidArgument`. `pass_over_unknown` skips sets that only a newer version knows: a reader needs just one
    set that it can verify with."""
    found: list[ContentDigests] = []
    for index, message in enumerate(messages):
        field = f"digests[{index}]"
        algorithm, coverage = _ALGORITHMS.get(message.algorithm), _COVERAGES.get(message.coverage)
        if pass_over_unknown and (algorithm is None or coverage is None):
            continue
        if algorithm is None:
            raise InvalidArgument(f"{field}.algorithm", message.algorithm, "a known algorithm")
        if coverage is None:
            raise InvalidArgument(f"{field}.coverage", message.coverage, "DIGEST_COVERAGE_FULL or _SAMPLED")
        if not 512 <= message.block_bytes <= 1 << 30:
            raise InvalidArgument(f"{field}.block_bytes", message.block_bytes, "512 to 1073741824")
        if len(message.values) != tensor_count:
            raise InvalidArgument(
                f"{field}.values", len(message.values), f"{tensor_count} digests, one for each tensor"
            )
        found.append(ContentDigests(algorithm, coverage, message.block_bytes, tuple(message.values)))
    if not found:
        raise InvalidArgument("digests", "empty", "at least one set of digests of a known kind")
    return tuple(found)


def coverage_to_wire(coverage: DigestCoverage | None) -> pb.DigestCoverage.ValueType:
    return _COVERAGE_VALUES[coverage] if coverage is not None else pb.DIGEST_COVERAGE_UNSPECIFIED


def coverage_from_wire(value: pb.DigestCoverage.ValueType) -> DigestCoverage | None:
    """None if the coverage is unset or unknown."""
    return _COVERAGES.get(value)


def placements_to_wire(placements: Iterable[tuple[int, int]]) -> list[pb.TensorPlacement]:
    """(region index, offset in bytes) of each tensor."""
    return [pb.TensorPlacement(region_index=index, offset_bytes=offset) for index, offset in placements]


def lease_end(lease: resources_pb2.ColdLoadLease) -> float:
    """When a lease ends, in seconds since the epoch by this process's clock: the broker's may differ."""
    if lease.HasField("remaining"):
        return time.time() + lease.remaining.ToNanoseconds() / 1e9
    return lease.expire_time.ToNanoseconds() / 1e9
