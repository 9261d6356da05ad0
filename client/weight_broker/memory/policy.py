"""How device memory is read and filled: in place, or through a staging buffer of the broker."""

from __future__ import annotations

import enum
import os

from weight_broker.errors import InvalidArgument
from weight_broker.kinds import TRAITS

PATH_VARIABLE = "WEIGHT_BROKER_DEVICE_PATH"


class StagingPolicy(enum.StrEnum):
    """How device memory may be read and filled."""

    AUTO = "auto"
    """In place or staged: the broker picks."""
    DIRECT = "direct"
    """In place."""
    STAGED = "staged"
    """Through a staging buffer."""

    @property
    def allows_direct(self) -> bool:
        """Whether the broker may map the memory."""
        return self is not StagingPolicy.STAGED

    def allows_staging(self, kind: str) -> bool:
        """Whether this process may copy memory of this kind for the broker."""
        return self is StagingPolicy.STAGED or (self is StagingPolicy.AUTO and TRAITS[kind].can_be_staged)


def staging_policy(device_path: str | None) -> StagingPolicy:
    """`device_path`, else the environment's policy, else `auto`. Raises `InvalidArgument`."""
    name, value = "device_path", device_path
    if value is None:
        name, value = PATH_VARIABLE, os.environ.get(PATH_VARIABLE, StagingPolicy.AUTO)
    if value not in list(StagingPolicy):
        raise InvalidArgument(name, value, "'auto', 'direct' or 'staged'")
    return StagingPolicy(value)
