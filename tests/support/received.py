"""A request as the api's checks get it."""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.message import Message

from weight_brokerd.api.incoming.layouts import LayoutCache
from weight_brokerd.api.incoming.requests import Received, received
from weight_brokerd.kinds.steps import at_once

M = TypeVar("M", bound=Message)


def as_received(request: M) -> Received[M]:
    """The request after the wire."""
    return at_once(received(request.SerializeToString(), type(request), LayoutCache()))
