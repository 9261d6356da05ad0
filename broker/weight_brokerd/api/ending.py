"""What happens when a call ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import grpc


def on_end(context: grpc.aio.ServicerContext[Any, Any], action: Callable[[], None]) -> None:
    """Calls `action` once the call is over, however it ended: answered, cancelled, past its deadline, or cut off."""

    def ended(_: grpc.aio.ServicerContext[Any, Any]) -> None:
        action()

    context.add_done_callback(cast(Any, ended))  # typeshed declares the callback's type as a class, not a protocol
