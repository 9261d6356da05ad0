"""A card process, seen from the daemon's loop."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import TypeVar

import structlog

from weight_brokerd.cards import messages
from weight_brokerd.cards.configuration import CardsConfiguration
from weight_brokerd.cards.errors import CardLost, CardRefused, CardUnavailable
from weight_brokerd.cards.messages import Role
from weight_brokerd.cards.packets import PACKET_BYTES, Joiner, split
from weight_brokerd.cards.tasks import uninterrupted

log = structlog.get_logger()
AnswerT = TypeVar("AnswerT", bound=messages.Answer)
_STDERR_BYTES = 4096
_LAST_WORDS_SECONDS = 0.5


class EngineFailed(CardRefused):
    """The engine failed after it had begun. It may go on writing: the process is to be ended."""


class CardProcess:
    """One child. Requests may overlap; answers are matched by number."""

    def __init__(
        self,
        role: Role,
        device: int,
        process: asyncio.subprocess.Process,
        connection: socket.socket,
        configuration: CardsConfiguration,
    ) -> None:
        self.role = role
        self.device = device
        self.ready = messages.Ready(0, "", "", {})
        self.on_end: Callable[[], None] = lambda: None
        """Called once, when the process has ended, whoever ended it."""
        self._process = process
        self._connection = connection
        self._configuration = configuration
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[messages.Message]] = {}
        self._sending = asyncio.Lock()
        self._joiner = Joiner()
        self._stderr = b""
        self._exited = asyncio.Event()
        asyncio.get_running_loop().add_reader(connection.fileno(), self._receive)
        self._tasks = asyncio.create_task(self._read_stderr()), asyncio.create_task(self._await_exit())

    @classmethod
    async def start(cls, role: Role, device: int, configuration: CardsConfiguration) -> CardProcess:
        """A process that serves. Raises CardUnavailable with the driver's or the engine's words."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "weight_brokerd.cards.child",
                    f"--role={role}",
                    f"--device={device}",
                    f"--socket={theirs.fileno()}",
                    pass_fds=[theirs.fileno()],
                    env=configuration.child_environment(),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.PIPE,
                )
        except BaseException:
            ours.close()
            raise
        child = cls(role, device, process, ours, configuration)
        first = messages.Start(
            configuration.worker_host,
            configuration.worker_port,
            int(configuration.start_seconds * 500),
            dict(configuration.credentials),
        )
        try:
            child.ready = await child.request(first, messages.Ready, configuration.start_seconds)
        except BaseException as error:
            await uninterrupted(child.kill())
            if isinstance(error, TimeoutError):
                raise CardUnavailable(
                    f"the {role} of device {device} did not start within {configuration.start_seconds:g} s"
                ) from None
            if isinstance(error, (CardRefused, CardLost)):
                raise CardUnavailable(f"the {role} of device {device} does not start: {error}") from error
            raise
        log.info("card_process_started", role=role, device=device, pid=child.pid, seconds=child.ready.seconds)
        return child

    @property
    def pid(self) -> int:
        """Its pid here; exporters need `ready.bare_tgid`."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether it is gone: nothing is mapped there any more."""
        return self._exited.is_set()

    async def request(self, request: messages.Request, answer: type[AnswerT], timeout: float) -> AnswerT:
        """Asks and waits. Raises TimeoutError (the request goes on there), CardRefused, EngineFailed, CardLost."""
        if self._exited.is_set():
            raise CardLost(self._epitaph())
        number = next(self._numbers)
        future: asyncio.Future[messages.Message] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            async with asyncio.timeout(timeout):
                await asyncio.shield(self._send(messages.encode(number, request)))
                received = await future
        except ConnectionError:
            await self.kill()
            raise CardLost(self._epitaph()) from None
        finally:
            self._waiting.pop(number, None)
        if isinstance(received, messages.Refusal):
            raise (EngineFailed if received.started else CardRefused)(received.words)
        if not isinstance(received, answer):
            raise CardLost(f"the {self.role} of device {self.device} answers {received!r}")
        return received

    async def ask(self, request: messages.Request, timeout: float | None = None) -> messages.Done:
        """`request` for what is answered by Done."""
        return await self.request(request, messages.Done, timeout or self._configuration.request_seconds)

    async def kill(self) -> bool:
        """Kills it and waits until it is gone, which its driver may delay; False if that takes too long."""
        if not self._exited.is_set():
            with contextlib.suppress(ProcessLookupError):  # it has just ended; the loop has not heard of it
                os.kill(self.pid, signal.SIGKILL)
        try:
            async with asyncio.timeout(self._configuration.exit_seconds):
                await self._exited.wait()
        except TimeoutError:
            log.error("card_process_does_not_end", role=self.role, device=self.device, pid=self.pid)
            return False
        return True

    async def stop(self) -> bool:
        """Lets it give everything back and end; kills it if it does not. False: it is still there."""
        try:
            await self.ask(messages.Stop(), self._configuration.stop_seconds)
        except (TimeoutError, CardRefused, CardLost):
            return await self.kill()
        return await self.kill()

    async def _send(self, message: bytes) -> None:
        """To be shielded: a message that is cut off would spoil the next one."""
        loop = asyncio.get_running_loop()
        async with self._sending:
            for packet in split(message):
                if self._connection.fileno() < 0:
                    raise ConnectionResetError
                await loop.sock_sendall(self._connection, packet)

    def _receive(self) -> None:
        while True:
            try:
                packet = self._connection.recv(PACKET_BYTES)
            except BlockingIOError:
                return
            except ConnectionError:
                packet = b""
            if not packet:
                self._close()
                return
            try:
                message = self._joiner.add(packet)
                if message is None:
                    continue
                number, answer = messages.decode(message)
            except ValueError as error:
                log.error("card_process_talks_nonsense", role=self.role, device=self.device, error=str(error))
                self._close()
                os.kill(self.pid, signal.SIGKILL)
                return
            future = self._waiting.get(number)
            if future is not None and not future.done():
                future.set_result(answer)

    def _close(self) -> None:
        if self._connection.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._connection.fileno())
            self._connection.close()

    async def _read_stderr(self) -> None:
        """Keeps the end of what the engine or the interpreter say; the child itself says nothing."""
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
                future.set_exception(CardLost(self._epitaph()))
        self.on_end()

    def _receive_rest(self) -> None:
        """What it said before it ended may still be in the socket."""
        if self._connection.fileno() >= 0:
            self._receive()
        self._close()

    def _epitaph(self) -> str:
        status = self._process.returncode
        how = f"was killed by {signal.Signals(-status).name}" if status and status < 0 else f"ended with {status}"
        said = self._stderr.decode(errors="replace").strip().splitlines()
        return f"the {self.role} of device {self.device} (pid {self.pid}) {how}" + (f": {said[-1]}" if said else "")
