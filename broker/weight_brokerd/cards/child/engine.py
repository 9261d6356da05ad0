"""In a card process: its datasystem client, the engine that moves bytes between cards."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from weight_broker.drivers.acl import Acl
from weight_brokerd.cards.child.memory import Span

WARM_UP_BYTES = 2 << 20
_RETRY_SECONDS = 0.02
_TRY_AGAIN = "Try again"


class EngineError(Exception):
    """A call of the engine failed; the text has its words."""


class DatasystemClient:
    """Device objects under keys. Calls release the interpreter lock; after `warm_up` threads may call at once."""

    def __init__(
        self, host: str, port: int, device: int, *, connect_timeout_ms: int, credentials: Mapping[str, str]
    ) -> None:
        """Connects. Raises EngineError."""
        try:
            from yr.datasystem import Blob, DeviceBlobList, HeteroClient
        except ImportError as error:
            raise EngineError(f"the datasystem client cannot be loaded: {error}") from error
        self._blob, self._blob_list, self._device = Blob, DeviceBlobList, device
        self._client: Any = HeteroClient(host, port, connect_timeout_ms=connect_timeout_ms, **credentials)
        self._call("init")

    def warm_up(self, acl: Acl) -> None:
        """Uses the device once, from one thread: a first use by several threads at once blocks them for a minute."""
        address = acl.malloc(WARM_UP_BYTES)
        key = f"warm-up-{secrets.token_hex(16)}"
        self.offer(key, [(address, WARM_UP_BYTES)])
        self.withdraw(key, 5)
        acl.free(address)

    def offer(self, key: str, spans: Sequence[Span]) -> None:
        """dev_mset of a fresh key. Raises EngineError."""
        self._call("dev_mset", [key], [self._blobs(spans)])

    def fetch(self, key: str, spans: Sequence[Span], timeout_ms: int) -> None:
        """dev_mget. Raises EngineError; the engine may go on writing after it."""
        self._call("dev_mget", [key], [self._blobs(spans)], timeout_ms)

    def withdraw(self, key: str, seconds: float) -> None:
        """dev_local_delete, repeated for up to `seconds` while the late acknowledgement of a reader is on its way.
        Raises EngineError."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                self._call("dev_local_delete", [key])
            except EngineError as error:
                if _TRY_AGAIN not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_SECONDS)
            else:
                return

    def disconnect(self) -> None:
        """Ends the client: the worker forgets its keys at once instead of after a time-out."""
        self._client = None

    def _blobs(self, spans: Sequence[Span]) -> object:
        return self._blob_list(self._device, [self._blob(address, size) for address, size in spans])

    def _call(self, method: str, *arguments: object) -> None:
        try:
            failed = getattr(self._client, method)(*arguments)
        except (RuntimeError, TypeError) as error:
            raise EngineError(f"{method}: {' '.join(str(error).split())}") from error
        if failed:  # the failed keys; each call has one key
            raise EngineError(f"{method}: the engine returned {failed} as failed, without a reason")
