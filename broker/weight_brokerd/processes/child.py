"""A child process, seen from the daemon's loop."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import itertools
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import structlog

from weight_brokerd.processes import packets
from weight_brokerd.processes.codec import Codec
from weight_brokerd.processes.packets import PACKET_BYTES, Joiner, split

log = structlog.get_logger()
M = TypeVar("M")
_STDERR_BYTES = 4096
_LAST_WORDS_SECONDS = 0.5
_FULL_SECONDS = 0.005


@dataclass(slots=True)
class Received(Generic[M]):
    """An answer, and the descriptors that came with it, which its receiver closes."""

    message: M
    descriptors: list[int]

    def close(self) -> None:
        """Closes the descriptors."""
        while self.descriptors:
            os.close(self.descriptors.pop())


async def spawn(
    module: str, *arguments: str, environment: Mapping[str, str]
) -> tuple[asyncio.subprocess.Process, socket.socket]:
    """Starts `python -m module ... --socket=FD`; the process and the daemon's end of the socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    try:
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                module,
                *arguments,
                f"--socket={theirs.fileno()}",
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
            )
    except BaseException:
        ours.close()
        raise
    return process, ours


class ChildProcess(Generic[M]):
    """One child. Requests may overlap; answers are matched by number."""

    def __init__(
        self,
        name: str,
        process: asyncio.subprocess.Process,
        connection: socket.socket,
        codec: Codec[M],
        *,
        exit_seconds: float,
        lost: Callable[[str], Exception],
    ) -> None:
        """`name` is for people; `lost` makes the error that requests get when the process has ended."""
        self.name = name
        self.is_killed = False
        """Whether SIGKILL was sent: the process serves no more, but may not have ended yet."""
        self.on_end: Callable[[], None] = lambda: None
        """Called once, when the process has ended for any reason."""
        self.answered_at = -math.inf
        """When the last answer came, on the loop's clock."""
        self._process = process
        self._connection = connection
        self._codec = codec
        self._exit_seconds = exit_seconds
        self._lost = lost
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Received[M]]] = {}
        self._sending = asyncio.Lock()
        self._joiner = Joiner()
        self._descriptors: list[int] = []
        self._stderr = b""
        self._exited = asyncio.Event()
        asyncio.get_running_loop().add_reader(connection.fileno(), self._receive)
        self._tasks = asyncio.create_task(self._read_stderr()), asyncio.create_task(self._await_exit())

    @property
    def pid(self) -> int:
        """The pid in the daemon's namespace."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended: it has nothing mapped any more."""
        return self._exited.is_set()

    async def exchange(self, request: M, timeout: float, descriptor: int | None = None) -> Received[M]:
        """Sends a request and waits for the answer. Raises TimeoutError (the child goes on with the request), or the
        error of `lost`."""
        if self._exited.is_set():
            raise self._lost(self._epitaph())
        number = next(self._numbers)
        future: asyncio.Future[Received[M]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            async with asyncio.timeout(timeout):
                kept = os.dup(descriptor) if descriptor is not None else None  # the caller may close it meanwhile
                await asyncio.shield(self._send(self._codec.encode(number, request), kept))
                return await future
        except ConnectionError:
            await self.kill()
            raise self._lost(self._epitaph()) from None
        except BaseException:
            if future.done() and not future.cancelled() and future.exception() is None:
                future.result().close()
            raise
        finally:
            self._waiting.pop(number, None)
            if future.done() and not future.cancelled():
                future.exception()  # a lost connection may have been raised instead: asyncio is not to log this one

    async def kill(self) -> bool:
        """Kill and wait for the end, which the driver may delay; False after `exit_seconds`."""
        self.is_killed = True
        if not self._exited.is_set():
            with contextlib.suppress(ProcessLookupError):  # the process has just ended
                os.kill(self.pid, signal.SIGKILL)
        try:
            async with asyncio.timeout(self._exit_seconds):
                await self._exited.wait()
        except TimeoutError:
            log.error("child_process_not_ended", child=self.name, pid=self.pid)
            return False
        return True

    def leave(self) -> None:
        """Close the socket and let the process end by itself, also after the daemon. Nothing waits for it any more."""
        self._close()
        for task in self._tasks:
            task.cancel()
        # asyncio kills a process whose transport is destroyed, so this one stays until the daemon has ended.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._process))

    async def _send(self, message: bytes, descriptor: int | None) -> None:
        """Shield this call: a truncated message would corrupt the next one. Closes the descriptor."""
        loop = asyncio.get_running_loop()
        try:
            async with self._sending:
                for packet in split(message):
                    if descriptor is not None:
                        await self._send_with(packet, descriptor)
                        os.close(descriptor)
                        descriptor = None
                    elif self._connection.fileno() < 0:
                        raise ConnectionResetError
                    else:
                        await loop.sock_sendall(self._connection, packet)
        finally:
            if descriptor is not None:
                os.close(descriptor)

    async def _send_with(self, packet: bytes, descriptor: int) -> None:
        while True:
            if self._connection.fileno() < 0:
                raise ConnectionResetError
            try:
                packets.send(self._connection, packet, descriptor)
            except BlockingIOError:  # the child must read first; the event loop has no call that passes descriptors
                await asyncio.sleep(_FULL_SECONDS)
            else:
                return

    def _receive(self) -> None:
        while True:
            try:
                packet = packets.receive(self._connection, PACKET_BYTES)
            except BlockingIOError:
                return
            except ConnectionError:
                packet = None
            if packet is None:
                self._close()
                return
            self._descriptors += packet.descriptors
            try:
                message = self._joiner.add(packet.data)
                if message is None:
                    continue
                number, answer = self._codec.decode(message)
            except ValueError as error:
                log.error("child_message_invalid", child=self.name, error=str(error))
                self._close()
                os.kill(self.pid, signal.SIGKILL)
                return
            self.answered_at = asyncio.get_running_loop().time()
            received, self._descriptors = Received(answer, self._descriptors), []
            future = self._waiting.get(number)
            if future is not None and not future.done():
                future.set_result(received)
            else:
                received.close()

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())
        if self._connection.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._connection.fileno())
            self._connection.close()

    async def _read_stderr(self) -> None:
        """Keeps the last output of the engine or the interpreter; the child itself writes nothing."""
        stream = self._process.stderr
        assert stream is not None
        while data := await stream.read(_STDERR_BYTES):
            self._stderr = (self._stderr + data)[-_STDERR_BYTES:]

    async def _await_exit(self) -> None:
        await self._process.wait()
        await asyncio.wait({self._tasks[0]}, timeout=_LAST_WORDS_SECONDS)
        self._receive_rest()
        self._exited.set()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(self._lost(self._epitaph()))
        self.on_end()

    def _receive_rest(self) -> None:
        """Read answers that are still in the socket."""
        if self._connection.fileno() >= 0:
            self._receive()
        self._close()

    def _epitaph(self) -> str:
        status = self._process.returncode
        how = f"was killed by {signal.Signals(-status).name}" if status and status < 0 else f"ended with {status}"
        said = self._stderr.decode(errors="replace").strip().splitlines()
        return f"{self.name} (pid {self.pid}) {how}" + (f": {said[-1]}" if said else "")
