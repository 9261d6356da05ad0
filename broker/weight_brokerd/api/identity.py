"""Who calls: the token from the attach socket, sent as gRPC metadata."""

from __future__ import annotations

import os
from typing import Any

import grpc

from weight_broker.channel import TOKEN_METADATA_KEY
from weight_broker.errors import NotAdministrator, NotAttached
from weight_brokerd.attach.server import Session
from weight_brokerd.driver import Driver


def identify(driver: Driver, context: grpc.aio.ServicerContext[Any, Any]) -> Session:
    """The caller's session; raises `NotAttached`."""
    for name, value in context.invocation_metadata() or ():
        if name == TOKEN_METADATA_KEY:
            return driver.session(value if isinstance(value, bytes) else value.encode())
    raise NotAttached(f"this call needs metadata {TOKEN_METADATA_KEY}; attach to attach.sock first")


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
