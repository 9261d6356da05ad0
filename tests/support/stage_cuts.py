"""Cuts the stage connection of this process between two steps of a call. Called through `CardProcess`."""

from __future__ import annotations

import select
import socket
import threading
from pathlib import Path

from support import device_instance
from support.waiting import eventually
from weight_broker.connection.deadline import REQUEST_TIMEOUT_SECONDS
from weight_broker.connection.stage_server import StagedTensors, StagingServer

_GUARD_MS = 60_000
_left = [0]
_add = StagingServer.add


def cut_next(times: int) -> None:
    """The next connections end after a call has named its tensors, and before it asks the broker for anything."""
    _left[0] = times


def cut_now() -> None:
    """The broker has seen the end of the connection when this returns."""
    _cut(device_instance.client()._attachment.session().staging)


def cut_when_told(directory: str) -> None:
    """`cut_now`, while this process is in a call, once there is a file `cut`. Then there is a file `done`."""

    def obey() -> None:
        eventually(Path(directory, "cut").exists, within=60)
        cut_now()
        Path(directory, "done").touch()

    threading.Thread(target=obey, daemon=True).start()


def _cut(server: StagingServer) -> None:
    connected = server._socket
    assert connected is not None
    seen = select.poll()
    watched = connected.dup()
    seen.register(watched, select.POLLRDHUP)
    connected.shutdown(socket.SHUT_WR)
    with watched:
        assert seen.poll(_GUARD_MS), "the broker keeps its end open"


def _add_and_cut(
    self: StagingServer, stage_id: str, tensors: StagedTensors, timeout: float = REQUEST_TIMEOUT_SECONDS
) -> None:
    _add(self, stage_id, tensors, timeout)
    if _left[0]:
        _left[0] -= 1
        _cut(self)


StagingServer.add = _add_and_cut  # type: ignore[method-assign]
