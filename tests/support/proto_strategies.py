"""Hypothesis over protobuf: valid messages in which one thing is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

Field = Any
"""A FieldDescriptor; protobuf has two classes of them and only one has a public name."""

_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, (1 << 64) - 1),
}
_TEXTS = (
    "",
    "\0",
    "a\0b",
    "\n",
    "🚀" * 80,
    "🚀" * 2000,
    "%" * 5000,
    "x" * 65,
    "x" * 100_000,
    "../../etc/passwd",
    "{0}%s%n",
    "\u202e\ufeff\uffff",
    "publication-1",
)


@dataclass(frozen=True)
class Mutation:
    """A message in which one field is not what it was."""

    message: Message
    field: str
    """The changed field of the message itself: the first part of its path."""
    path: str
    """The whole path to what was changed, without indexes: `layout.tensors.dtype`."""
    how: str
    """What was done to it: `missing`, `empty`, `none`, `one less`, ... or `= value`."""
    kind: Field

    def __repr__(self) -> str:
        return f"<{self.path} {self.how} in {type(self.message).__name__}>"

    @property
    def is_no_known_value(self) -> bool:
        """True for a single enum field that is not set or has a value without a name."""
        if self.kind.cpp_type != FieldDescriptor.CPPTYPE_ENUM or self.kind.is_repeated:
            return False
        return self.number == 0 or self.number not in {value.number for value in self.kind.enum_type.values}

    @property
    def number(self) -> int:
        """The value that a field with a number was given."""
        return int(self.how.removeprefix("= "))


@dataclass(frozen=True)
class _Site:
    """A field somewhere in a message: `steps` lead from the message to the one that has it."""

    steps: tuple[tuple[Field, int | None], ...]
    field: Field

    def owner(self, message: Message) -> Any:
        """The message that has the field."""
        for step, index in self.steps:
            inner = getattr(message, step.name)
            message = inner if index is None else inner[index]
        return message

    @property
    def root(self) -> str:
        """Name of the outermost field."""
        return str((self.steps[0][0] if self.steps else self.field).name)

    @property
    def path(self) -> str:
        """The whole path, without indexes."""
        return ".".join([*(step.name for step, _ in self.steps), self.field.name])


@st.composite
def mutations(draw: st.DrawFn, message: Message) -> Mutation:
    """A copy of a message in which one field, however deep, is missing, wrong, extreme, repeated or something else."""
    copied = type(message)()
    copied.CopyFrom(message)
    site = draw(st.sampled_from(list(_sites(message))))
    how = _change(draw, site.owner(copied), site.field)
    return Mutation(copied, site.root, site.path, how, site.field)


def certain_mutations(message: Message) -> Iterator[Mutation]:
    """Of every field, however deep: left out, emptied, without a known value, negative, too many, too few."""
    for site in _sites(message):
        for how in _certain_ways(site.owner(message), site.field):
            copied = type(message)()
            copied.CopyFrom(message)
            owner, field, shown = site.owner(copied), site.field, str(how)
            if field.is_repeated:
                _repeat(owner, field, shown)
            elif field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
                owner.ClearField(field.name)
            else:
                setattr(owner, field.name, how)
                shown = f"= {how!r}"
            if copied != message:
                yield Mutation(copied, site.root, site.path, shown, field)


def _certain_ways(owner: Any, field: Field) -> list[str | int]:
    """What can be done to a field: a word for lists and messages, a value for the others."""
    kind = field.cpp_type
    if field.is_repeated:
        return ["none", "one less", "doubled"]
    if kind == FieldDescriptor.CPPTYPE_MESSAGE:
        return ["missing"] if owner.HasField(field.name) else []
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return [0, max(value.number for value in field.enum_type.values) + 1, -1]
    if kind in _RANGES:
        return sorted({0, _RANGES[kind][0]})
    return [""] if kind == FieldDescriptor.CPPTYPE_STRING else []


def broken_bytes(message: Message) -> st.SearchStrategy[bytes]:
    """What is no message of this type, or another one: noise, or it cut off, extended or with bytes changed."""
    # Positions are drawn from a range of their own: ids in the message may get longer from one example to the next.
    wire = message.SerializeToString()
    noise = st.binary(max_size=64)
    if not wire:
        return noise
    position = st.integers(0, (1 << 16) - 1)
    cut = position.map(lambda end: wire[: end % len(wire)])
    extended = noise.map(lambda more: wire + more)
    changes = st.lists(st.tuples(position, st.integers(1, 255)), min_size=1, max_size=4)
    return st.one_of(noise, cut, extended, changes.map(lambda chosen: _flipped(wire, chosen)))


def _flipped(wire: bytes, changes: list[tuple[int, int]]) -> bytes:
    changed = bytearray(wire)
    for position, difference in changes:
        changed[position % len(wire)] ^= difference
    return bytes(changed)


def _sites(message: Message, steps: tuple[tuple[Field, int | None], ...] = ()) -> Iterator[_Site]:
    for field in message.DESCRIPTOR.fields:
        yield _Site(steps, field)
        if field.cpp_type != FieldDescriptor.CPPTYPE_MESSAGE:
            continue
        if field.is_repeated:
            for index, element in enumerate(getattr(message, field.name)):
                yield from _sites(element, (*steps, (field, index)))
        elif message.HasField(field.name):
            yield from _sites(getattr(message, field.name), (*steps, (field, None)))


def _change(draw: st.DrawFn, owner: Any, field: Field) -> str:
    if field.is_repeated:
        return _change_repeated(draw, owner, field)
    if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        if owner.HasField(field.name) and draw(st.booleans()):
            owner.ClearField(field.name)
            return "missing"
        # Set where it was not: another member of a oneof, an optional part; or emptied.
        owner.ClearField(field.name)
        getattr(owner, field.name).SetInParent()
        return "empty"
    value = draw(_values(field))
    setattr(owner, field.name, value)
    return f"= {repr(value)[:40]}"


def _change_repeated(draw: st.DrawFn, owner: Any, field: Field) -> str:
    how = draw(st.sampled_from(["none", "one less", "one more", "doubled", "reversed"]))
    _repeat(owner, field, how)
    if how == "one more" and field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        getattr(owner, field.name).add()
    elif how == "one more":
        getattr(owner, field.name).append(draw(_values(field)))
    return how


def _repeat(owner: Any, field: Field, how: str) -> None:
    before = [_copy(value) for value in getattr(owner, field.name)]
    after = {"none": [], "one less": before[:-1], "doubled": before + before, "reversed": before[::-1]}
    owner.ClearField(field.name)
    getattr(owner, field.name).extend(after.get(how, before))


def _copy(value: Any) -> Any:
    if not isinstance(value, Message):
        return value
    copied = type(value)()
    copied.CopyFrom(value)
    return copied


def _values(field: Field) -> st.SearchStrategy[Any]:
    kind = field.cpp_type
    if kind in _RANGES:
        least, most = _RANGES[kind]
        return st.one_of(st.sampled_from([0, 1, least, most, most // 2, max(least, -1)]), st.integers(least, most))
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        known = [value.number for value in field.enum_type.values]
        return st.sampled_from([*known, max(known) + 1, 1000, -1, -(1 << 31), (1 << 31) - 1])
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=64)
    # Every text that UTF-8 can carry; protobuf refuses lone surrogates on the sender's side already.
    return st.one_of(st.sampled_from(_TEXTS), st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
