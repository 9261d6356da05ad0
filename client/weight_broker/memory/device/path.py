"""How device memory is read and filled: where it is, or through a bucket of the broker's."""

from __future__ import annotations

import enum
import os

from weight_broker.errors import BrokerError, InvalidArgument

PATH_VARIABLE = "WEIGHT_BROKER_DEVICE_PATH"
_STAGED_KINDS = frozenset({"npu"})


class DevicePath(enum.StrEnum):
    """How device memory is read and filled."""

    AUTO = "auto"
    """Where it is, or through a bucket if that is not possible."""
    DIRECT = "direct"
    """Where it is."""
    STAGED = "staged"
    """Through a bucket."""


def device_path(given: str | None) -> DevicePath:
    """What was given, else what the environment says, else `auto`. Raises `InvalidArgument`."""
    name, value = ("device_path", given) if given is not None else (PATH_VARIABLE, os.environ.get(PATH_VARIABLE))
    if value is None:
        return DevicePath.AUTO
    if value not in list(DevicePath):
        raise InvalidArgument(name, value, "'auto', 'direct' or 'staged'")
    return DevicePath(value)


def can_stage(device_kind: str) -> bool:
    """Whether this client can copy such memory through a bucket."""
    return device_kind in _STAGED_KINDS


def may_stage(device_kind: str, error: BrokerError) -> bool:
    """Whether what failed may be tried through a bucket."""
    return can_stage(device_kind) and error.metadata.get("path") == "staged" and error.quiesced
