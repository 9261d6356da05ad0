"""What a request to a child process comes to."""

from __future__ import annotations

import asyncio
import gc
import socket
import sys
from dataclasses import dataclass

import pytest

from weight_brokerd.processes.child import ChildProcess
from weight_brokerd.processes.codec import Codec


@dataclass(frozen=True)
class Question:
    text: str


def test_a_request_that_cannot_be_sent_is_raised_once_and_not_logged_besides() -> None:
    """The child has lost its end of the connection; it is killed, and asyncio has nothing to say about that."""
    logged: list[dict[str, object]] = []

    async def ask() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "input()", stdin=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        child = ChildProcess("child", process, ours, Codec([Question]), exit_seconds=60, lost=OSError)
        asyncio.get_running_loop().remove_reader(ours.fileno())  # it would see the end first
        theirs.close()
        with pytest.raises(OSError, match="SIGKILL"):
            await child.exchange(Question("how are you"), 60)
        assert child.has_ended

    asyncio.run(ask())
    gc.collect()
    assert logged == []
