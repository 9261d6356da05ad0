"""Rules: the values that a setting may have."""

from __future__ import annotations

import grp
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass

from weight_broker.runtime_directory import ATTACH_SOCKET, GRPC_SOCKET, MAXIMUM_SOCKET_PATH_BYTES


class UnfitValueError(ValueError):
    """The value breaks the rule. The text is a hint, possibly empty."""


@dataclass(frozen=True, slots=True)
class Rule:
    """The check of one setting."""

    expected: str
    """The allowed values, for people."""
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


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise UnfitValueError
    return value


def _parse_flag(text: str) -> object:
    return {"true": True, "false": False}.get(text.lower())


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


def _absolute_path(value: object) -> str:
    path = _text(value)
    if path and (not os.path.isabs(path) or "\0" in path):
        raise UnfitValueError
    return path


def _absolute_paths(value: object) -> str:
    paths = _text(value)
    for path in paths.split(":") if paths else ():
        if not _absolute_path(path):
            raise UnfitValueError
    return paths


def read_secret(path: str) -> str:
    """The secret in a file, without the newline at its end; raises `UnfitValueError`, which never quotes the secret."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MAXIMUM_SECRET_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UnfitValueError(f"It cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        secret = content.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise UnfitValueError("It is not UTF-8") from None
    if not secret:
        raise UnfitValueError("It is empty")
    if len(content) > _MAXIMUM_SECRET_BYTES or "\n" in secret or "\0" in secret:
        raise UnfitValueError("It has more than one line" if "\n" in secret else "It is no secret of the datasystem")
    return secret


def _secret_file(value: object) -> str:
    path = _absolute_path(value)
    if path:
        read_secret(path)
    return path


def _worker_arguments(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise UnfitValueError("Put them into brackets, each in quotes")
    for argument in value:
        match = re.fullmatch(r"--([a-z0-9_]+)=[^\0]+", _text(argument))
        if match is None:
            raise UnfitValueError(f"{argument!r} is none")
        if setting := _WORKER_FLAGS_OF_SETTINGS.get(match[1]):
            raise UnfitValueError(f"{argument!r}: {setting}")
        if re.search(r"secret|password|passphrase|data_key$", match[1]) and not match[1].endswith("_path"):
            raise UnfitValueError(f"--{match[1]}: others can read command lines, so no secret may be there")
    return tuple(value)


def _parse_arguments(text: str) -> object:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UnfitValueError(str(error)) from error


_MAXIMUM_SECRET_BYTES = 64 << 10
_WORKER_FLAGS_OF_SETTINGS = {
    "worker_address": "set datasystem.managed_port",
    "bind_address": "the managed worker listens on 127.0.0.1 only",
    "metastore_address": "set datasystem.metastore_port",
    "start_metastore_service": "the managed worker always is its own metastore",
    "etcd_address": "the managed worker is its own metastore; run a worker yourself and set datasystem.worker_address",
    "shared_memory_size_mb": "set datasystem.shared_memory_mb",
    **dict.fromkeys(
        (
            "health_check_path",
            "log_dir",
            "monitor_config_file",
            "ready_check_path",
            "rocksdb_store_dir",
            "unix_domain_socket_dir",
        ),
        "set datasystem.directory",
    ),
}
"""Flags of the managed worker that other settings determine, each with what to do instead."""

flag = Rule("true or false", _flag, _parse_flag)
identifier = Rule("at most 64 letters, digits, '.', '_', ':' or '-'", _identifier)
group = Rule("the name of a group that exists", _group)
runtime_directory = Rule(
    f"an absolute path of at most {MAXIMUM_SOCKET_PATH_BYTES - 1 - len(ATTACH_SOCKET)} bytes", _runtime_directory
)
socket_mode = Rule("permissions in octal such as '0660': read and write for the owner, no execute bit", _socket_mode)
listen_address = Rule("HOST:PORT such as '127.0.0.1:9464', or nothing", _listen)
worker_address = Rule("HOST:PORT such as '127.0.0.1:31501', or nothing", _listen)
absolute_path = Rule("an absolute path, or nothing", _absolute_path)
absolute_paths = Rule("absolute paths with ':' between them, or nothing", _absolute_paths)
secret_file = Rule("the absolute path of a file with one line that is the secret, or nothing", _secret_file)
worker_arguments = Rule(
    "a list of flags of datasystem_worker, each as '--name=value'", _worker_arguments, _parse_arguments
)
