"""The ranks of one engine, which load all from peers or all from disk."""

from __future__ import annotations

import math
from dataclasses import dataclass

from weight_broker.errors import InvalidArgument

MAX_ID_CHARACTERS = 64
MAX_SIZE = 4096


@dataclass(frozen=True, slots=True)
class LoadGroup:
    """This process's rank, for an engine of several ranks on this host."""

    group_id: str
    """Names the engine; no other engine uses it."""
    member: int
    """This rank, from 0."""
    size: int
    """Number of ranks."""
    assembly_timeout: float = 60.0
    """Seconds to wait for the other ranks' acquires."""

    def __post_init__(self) -> None:
        if not isinstance(self.group_id, str) or not 0 < len(self.group_id) <= MAX_ID_CHARACTERS:
            raise InvalidArgument("group.group_id", self.group_id, f"a text of 1 to {MAX_ID_CHARACTERS} characters")
        if not _is_integer(self.size) or not 2 <= self.size <= MAX_SIZE:
            raise InvalidArgument("group.size", self.size, f"an integer from 2 to {MAX_SIZE}")
        if not _is_integer(self.member) or not 0 <= self.member < self.size:
            raise InvalidArgument("group.member", self.member, f"an integer from 0 to {self.size - 1}")
        seconds = self.assembly_timeout
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
            raise InvalidArgument("group.assembly_timeout", seconds, "a positive number of seconds")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
