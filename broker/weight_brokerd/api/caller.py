"""The caller's identity and rights, and the end of a call."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, cast

import grpc

from weight_broker.errors import NotAdministrator, NotAttached
from weight_broker.wire import TOKEN_METADATA_KEY
from weight_brokerd.api.front.front import Front
from weight_brokerd.attach.server import Session
from weight_brokerd.control.control import Control
from weight_brokerd.core.model import Process


def on_end(context: grpc.aio.ServicerContext[Any, Any], action: Callable[[], None]) -> None:
    """Calls `action` once the call is over: answered, cancelled, past its deadline or cut off."""

    def ended(_: grpc.aio.ServicerContext[Any, Any]) -> None:
        action()

    context.add_done_callback(cast(Any, ended))  # typeshed declares the callback's type as a class, not a protocol


def identify(control: Control, context: grpc.aio.ServicerContext[Any, Any]) -> Session:
    """The caller's session; raises `NotAttached`."""
    for name, value in context.invocation_metadata() or ():
        if name == TOKEN_METADATA_KEY:
            return control.sessions.session(value if isinstance(value, bytes) else value.encode())
    raise NotAttached(f"this call needs metadata {TOKEN_METADATA_KEY}; attach to attach.sock first")


class Callers:
    """Whose a call is, with a token or without one."""

    def __init__(self, control: Control, front: Front) -> None:
        self._control = control
        self._front = front

    def user(self, context: grpc.aio.ServicerContext[Any, Any]) -> int | None:
        """The user that a valid token proves; None without one."""
        try:
            return identify(self._control, context).peer.uid
        except NotAttached:
            return None

    def require_room(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Raises LIMIT_EXCEEDED for a call over a connection that its process has too many of."""
        self._front.require_room(context.peer())

    def process(self, context: grpc.aio.ServicerContext[Any, Any]) -> Process | None:
        """The process that attached with the call's token, or else the one that has connected; None if its connection
        has ended, or did not come through the front."""
        connected = self._front.process_of(context.peer())
        if connected is None:
            return None
        for name, value in context.invocation_metadata() or ():
            if name == TOKEN_METADATA_KEY:
                process = self._control.sessions.process(value if isinstance(value, bytes) else value.encode())
                if process is not None:
                    return process
        return connected


def require_administrator(session: Session, admin_gid: int | None) -> None:
    """Raises `NotAdministrator` unless the caller is root, the broker's own user or in the administrators' group."""
    peer = session.peer
    groups = peer.groups | {peer.gid}
    if peer.uid in (0, os.geteuid()) or (admin_gid is not None and admin_gid in groups):
        return
    raise NotAdministrator(
        f"user id {peer.uid} may not administer this broker; "
        "call as root, as the broker's user or as a member of the administrators' group (broker.admin_group)",
        metadata={"uid": str(peer.uid)},
    )
