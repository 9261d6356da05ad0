"""The identity of a weight set.

Two weight sets may stand in for each other only if every field of their keys is equal. The id is a digest of the
canonical form: JSON with sorted names, no white space and no escapes but those JSON demands, so that any language can
compute it. tests/client/test_key.py pins it with vectors.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from types import MappingProxyType

from weight_broker.errors import InvalidArgument

MAX_TEXT_CHARACTERS = 4096
MAX_ENGINE_ATTRIBUTES = 64
MAX_PARALLEL_SIZE = 1 << 20
_FORM = "weight-set-key/1"


class Role(enum.StrEnum):
    """Whose weights they are."""

    TARGET = "target"
    DRAFT = "draft"


class Stage(enum.StrEnum):
    """The state of the tensors: before or after the engine's weight post-processing."""

    LOADED = "loaded"
    RUNTIME = "runtime"


@dataclass(frozen=True, slots=True)
class ParallelRank:
    """One rank of a model: for each kind of parallelism the rank in its group and the group's size."""

    tensor_parallel_rank: int = 0
    tensor_parallel_size: int = 1
    pipeline_parallel_rank: int = 0
    pipeline_parallel_size: int = 1
    expert_parallel_rank: int = 0
    expert_parallel_size: int = 1
    data_parallel_rank: int = 0
    data_parallel_size: int = 1

    def __post_init__(self) -> None:
        for kind in ("tensor", "pipeline", "expert", "data"):
            rank = getattr(self, f"{kind}_parallel_rank")
            size = getattr(self, f"{kind}_parallel_size")
            if not _is_integer(size) or not 1 <= size <= MAX_PARALLEL_SIZE:
                raise InvalidArgument(f"rank.{kind}_parallel_size", size, f"an integer from 1 to {MAX_PARALLEL_SIZE}")
            if not _is_integer(rank) or not 0 <= rank < size:
                raise InvalidArgument(
                    f"rank.{kind}_parallel_rank", rank, f"an integer from 0 to {size - 1}, below its group's size"
                )


@dataclass(frozen=True)
class WeightSetKey:
    """Identity of a weight set; any characters are allowed in every text."""

    model: str
    """Name or path of the model."""
    revision: str = ""
    """Revision of the model."""
    checkpoint_digest: str = ""
    """Digest of the checkpoint's structure and content; tells a fine-tune of the same shape apart
    (`weight_broker.integrations.checkpoint.checkpoint_digest`)."""
    dtype: str = "bfloat16"
    """The engine's weight data type."""
    quantization: str = ""
    """Quantization method and the digest of its configuration."""
    role: Role = Role.TARGET
    """Target or draft model."""
    stage: Stage = Stage.LOADED
    """Before or after the engine's weight post-processing."""
    rank: ParallelRank = field(default_factory=ParallelRank)
    """Which rank of the model."""
    engine_attributes: Mapping[str, str] = field(default_factory=dict)
    """Engine settings that change the bytes, for example a kernel back end."""

    def __post_init__(self) -> None:
        for name, required in (
            ("model", True),
            ("revision", False),
            ("checkpoint_digest", False),
            ("dtype", True),
            ("quantization", False),
        ):
            _check_text(f"key.{name}", getattr(self, name), required=required)
        for name, kind in (("role", Role), ("stage", Stage)):
            value = getattr(self, name)
            if value not in list(kind):
                raise InvalidArgument(f"key.{name}", value, " or ".join(repr(str(member)) for member in kind))
            object.__setattr__(self, name, kind(value))
        if not isinstance(self.rank, ParallelRank):
            raise InvalidArgument("key.rank", self.rank, "a ParallelRank")
        if not isinstance(self.engine_attributes, Mapping):
            raise InvalidArgument("key.engine_attributes", self.engine_attributes, "a mapping of names to texts")
        if len(self.engine_attributes) > MAX_ENGINE_ATTRIBUTES:
            raise InvalidArgument(
                "key.engine_attributes", len(self.engine_attributes), f"at most {MAX_ENGINE_ATTRIBUTES} attributes"
            )
        for name, value in self.engine_attributes.items():
            _check_text("key.engine_attributes name", name, required=True)
            _check_text(f"key.engine_attributes[{name!r}]", value, required=False)
        object.__setattr__(self, "engine_attributes", MappingProxyType(dict(sorted(self.engine_attributes.items()))))

    @cached_property
    def canonical(self) -> str:
        """The canonical form that the id is derived from."""
        form = {
            "form": _FORM,
            "model": self.model,
            "revision": self.revision,
            "checkpoint_digest": self.checkpoint_digest,
            "dtype": self.dtype,
            "quantization": self.quantization,
            "role": str(self.role),
            "stage": str(self.stage),
            "rank": {field_.name: getattr(self.rank, field_.name) for field_ in fields(self.rank)},
            "engine_attributes": dict(self.engine_attributes),
        }
        return json.dumps(form, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @cached_property
    def id(self) -> str:
        """The weight set's id: the first 32 hex digits of the SHA-256 of the canonical form."""
        return hashlib.sha256(self.canonical.encode("utf-8")).hexdigest()[:32]

    def __hash__(self) -> int:
        return hash(self.id)

    def __reduce__(self) -> tuple[object, ...]:
        values = {field_.name: getattr(self, field_.name) for field_ in fields(self)}
        values["engine_attributes"] = dict(self.engine_attributes)
        return (_rebuild_key, (values,))

    def differing_fields(self, other: WeightSetKey) -> tuple[str, ...]:
        """Names of the fields in which the two keys differ, for people."""
        names: list[str] = []
        for field_ in fields(self):
            own, other_value = getattr(self, field_.name), getattr(other, field_.name)
            if own == other_value:
                continue
            if field_.name == "rank":
                names += [
                    part.name for part in fields(own) if getattr(own, part.name) != getattr(other_value, part.name)
                ]
            elif field_.name == "engine_attributes":
                names += [
                    f"engine_attributes[{name}]"
                    for name in sorted(own.keys() | other_value.keys())
                    if own.get(name) != other_value.get(name)
                ]
            else:
                names.append(field_.name)
        return tuple(names)


def _rebuild_key(values: dict[str, object]) -> WeightSetKey:
    return WeightSetKey(**values)  # type: ignore[arg-type]


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_text(name: str, value: object, *, required: bool) -> None:
    if not isinstance(value, str):
        raise InvalidArgument(name, value, "a text")
    if required and not value:
        raise InvalidArgument(name, value, "a text that is not empty")
    if len(value) > MAX_TEXT_CHARACTERS:
        raise InvalidArgument(name, value, f"at most {MAX_TEXT_CHARACTERS} characters, got {len(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidArgument(
            name, value, "text that UTF-8 can carry", hint="It has lone surrogates, as undecodable file names do."
        ) from None
