"""What the daemon and the process for host objects say to each other. Values travel as descriptors of memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from weight_brokerd.children.codec import Codec


@dataclass(frozen=True, slots=True)
class Connect:
    """The first request: connects to the worker. Answer: Done."""

    worker_host: str
    worker_port: int
    connect_timeout_ms: int
    request_timeout_ms: int
    """How long the engine may try one request."""
    credentials: dict[str, str] = field(default_factory=dict, repr=False)
    """Arguments of the client's constructor. They come over the socket because others can read command lines."""


@dataclass(frozen=True, slots=True)
class PutObject:
    """Stores a value, in place of an earlier one; the value comes as a descriptor. Answer: Done."""

    key: str
    size_bytes: int
    ttl_seconds: int = 0
    """The worker forgets it after so long; 0: never."""


@dataclass(frozen=True, slots=True)
class GetObject:
    """Fetches a value. Answer: Value, with a descriptor; or Refusal, with `is_missing`."""

    key: str


@dataclass(frozen=True, slots=True)
class ExistsObjects:
    """Which keys have a value. Answer: Existence."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DeleteObjects:
    """Forgets values; keys without one are fine. Answer: Done."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Stop:
    """Disconnects and ends. Answer: Done."""


@dataclass(frozen=True, slots=True)
class Done:
    """It is done."""


@dataclass(frozen=True, slots=True)
class Value:
    """The value is in the descriptor: a memfd, sealed, from its beginning."""

    size_bytes: int


@dataclass(frozen=True, slots=True)
class Existence:
    """In the order of the keys."""

    found: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """The request failed; `words` are the engine's."""

    words: str
    is_missing: bool = False
    """There is no such object: the engine is fine."""
    is_broken: bool = False
    """The engine did not reach the worker, or is in a state that nobody knows: the process is to be replaced."""


Request = Connect | PutObject | GetObject | ExistsObjects | DeleteObjects | Stop
Answer = Done | Value | Existence | Refusal
Message = Request | Answer

_KINDS: tuple[Callable[..., Message], ...] = (
    Connect,
    PutObject,
    GetObject,
    ExistsObjects,
    DeleteObjects,
    Stop,
    Done,
    Value,
    Existence,
    Refusal,
)
CODEC: Codec[Message] = Codec(_KINDS)
