"""Typed messages as JSON: dataclasses with fields of few types. Each message has a number and its class name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, Generic, TypeVar, get_type_hints

M = TypeVar("M")


class Codec(Generic[M]):
    """Encodes the messages between the daemon and one kind of child process."""

    def __init__(
        self, kinds: Iterable[Callable[..., M]], more_types: Mapping[Any, Callable[[Any], object]] | None = None
    ) -> None:
        """`kinds` are dataclasses. `more_types` has a function for each type of field that is not in `TYPES`. The
        function raises ValueError, TypeError, KeyError or AttributeError for an invalid value."""
        self._kinds = {kind.__name__: kind for kind in kinds}
        self._types = {**TYPES, **(more_types or {})}
        self._hints = {name: get_type_hints(kind) for name, kind in self._kinds.items()}

    def encode(self, number: int, message: M) -> bytes:
        """A message on the wire."""
        values = {field.name: getattr(message, field.name) for field in fields(message)}  # type: ignore[arg-type]
        return json.dumps([number, type(message).__name__, values], separators=(",", ":")).encode()

    def decode(self, data: bytes) -> tuple[int, M]:
        """The number and the message. Raises ValueError for data that `encode` did not make."""
        try:
            number, kind, values = json.loads(data)
            hints = self._hints[kind]
            arguments = {name: self._types[hints[name]](value) for name, value in values.items()}
            message = self._kinds[kind](**arguments)
        except (TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"not a message: {error!r}") from error
        return _integer(number), message


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    return value


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is not a number")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(_text, _list(value)))


def _integers(value: Any) -> tuple[int, ...]:
    return tuple(map(_integer, _list(value)))


def _flags(value: Any) -> tuple[bool, ...]:
    return tuple(map(_flag, _list(value)))


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is not a list")
    return value


def _texts_by_name(value: Any) -> dict[str, str]:
    return {_text(name): _text(text) for name, text in value.items()}


def _numbers_by_name(value: Any) -> dict[str, float]:
    return {_text(name): float(number) for name, number in value.items()}


TYPES: Mapping[Any, Callable[[Any], object]] = {
    str: _text,
    int: _integer,
    bool: _flag,
    tuple[str, ...]: _texts,
    tuple[int, ...]: _integers,
    tuple[bool, ...]: _flags,
    dict[str, str]: _texts_by_name,
    dict[str, float]: _numbers_by_name,
}
"""Types of fields, with the functions that check their JSON values."""
