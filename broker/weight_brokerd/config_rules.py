"""What values a setting may have."""

from __future__ import annotations

import grp
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from weight_broker.runtime_directory import ATTACH_SOCKET, GRPC_SOCKET, MAXIMUM_SOCKET_PATH_BYTES


class UnfitValueError(ValueError):
    """The value does not follow the rule; the text is a hint, possibly empty."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How one setting is checked."""

    expected: str
    """What is allowed, for people."""
    check: Callable[[object], object]
    """The value as the broker uses it; raises `UnfitValueError`."""
    parse: Callable[[str], object] = str
    """From the text of an environment variable; raises `UnfitValueError`."""


def whole_number(lowest: int, highest: int) -> Rule:
    """An integer in a range."""

    def check(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
            raise UnfitValueError
        return value

    def parse(text: str) -> object:
        try:
            return int(text)
        except ValueError as error:
            raise UnfitValueError from error

    return Rule(f"a whole number from {lowest} to {highest}", check, parse)


def number(lowest: float, highest: float) -> Rule:
    """A number in a range."""

    def check(value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not lowest <= value <= highest:
            raise UnfitValueError
        return float(value)

    def parse(text: str) -> object:
        try:
            return float(text)
        except ValueError as error:
            raise UnfitValueError from error

    return Rule(f"a number of seconds from {lowest} to {highest}", check, parse)


def one_of(*choices: str) -> Rule:
    """A word from a list."""

    def check(value: object) -> str:
        if not isinstance(value, str) or value not in choices:
            raise UnfitValueError
        return value

    return Rule(f"one of {', '.join(map(repr, choices))}", check)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise UnfitValueError("Put it in quotes")
    return value


def _identifier(value: object) -> str:
    text = _text(value)
    if text and not re.fullmatch(r"[A-Za-z0-9._:-]{1,64}", text):
        raise UnfitValueError
    return text


def _group(value: object) -> str:
    name = _text(value)
    if name:
        try:
            grp.getgrnam(name)
        except (KeyError, ValueError) as error:
            raise UnfitValueError(f"Create it with `groupadd --system {name}`, or leave the setting out") from error
    return name


def _runtime_directory(value: object) -> str:
    path = _text(value)
    if path and (not os.path.isabs(path) or "\0" in path):
        raise UnfitValueError
    longest = MAXIMUM_SOCKET_PATH_BYTES - 1 - max(len(ATTACH_SOCKET), len(GRPC_SOCKET))
    if len(os.fsencode(path)) > longest:
        raise UnfitValueError(f"It has {len(os.fsencode(path))} bytes")
    return path


def _socket_mode(value: object) -> str:
    text = _text(value)
    if not re.fullmatch(r"0?[0-7]{3}", text) or int(text, 8) & 0o600 != 0o600 or int(text, 8) & 0o111:
        raise UnfitValueError
    return text


def split_address(text: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT` or `[IPV6]:PORT`; raises `UnfitValueError`."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:\[\]]+)):(\d{1,5})", text)
    if match is None or not 1 <= int(match[3]) <= 65_535:
        raise UnfitValueError
    return match[1] or match[2], int(match[3])


def _listen(value: object) -> str:
    text = _text(value)
    if text:
        split_address(text)
    return text


identifier = Rule("at most 64 letters, digits, '.', '_', ':' or '-'", _identifier)
group = Rule("the name of a group that exists", _group)
runtime_directory = Rule(
    f"an absolute path of at most {MAXIMUM_SOCKET_PATH_BYTES - 1 - len(ATTACH_SOCKET)} bytes", _runtime_directory
)
socket_mode = Rule(
    "permissions in octal such as '0660': read and write for the owner, execute for nobody", _socket_mode
)
listen_address = Rule("HOST:PORT such as '127.0.0.1:9464', or nothing", _listen)
